"""Figure 8.5.2: the pattern in a picture that one feature map of the last layer of conv5_x
responded to, reconstructed by backpropagation."""

from common import cli
from extras import reconstruct


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, *reconstruct.FLAGS, "map").parse_args(argv)
    reconstruct.draw(args, "conv5_x", "strongest:1" if args.map is None else str(args.map))


if __name__ == "__main__":
    main()
