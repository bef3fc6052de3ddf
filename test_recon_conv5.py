"""Figure 8.5.2: the pattern in a picture that one feature map of the last layer of conv5_x responded to,
reconstructed by backpropagation."""

from common import cli
from test_recon_conv1 import draw


@cli.command
def main(argv=None):
    draw("conv5_x", __doc__, argv)


if __name__ == "__main__":
    main()
