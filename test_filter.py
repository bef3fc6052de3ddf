"""Figures 7.1 to 7.3: the 64 filters of conv1, one grid for each input channel, and in colour."""

from common import cli, figures
from common.device import select_device
from common.network import load_network
from common.page.client import save_figure


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "weights", "dataset", "out", "device", "port").parse_args(argv)
    network = load_network(args.weights, args.dataset, select_device(args.device))
    filters = network.model.conv1.conv.weight.detach().cpu()  # [64, 3, 7, 7], as trained
    largest = filters.abs().max()

    for channel, colour in enumerate(("red", "green", "blue")):
        title = f"Channel_{channel}: what the 64 filters of conv1 look for in {colour}"
        scale = dict(scale=largest, label="weight (one scale for all channels)", signed=True)
        figure = figures.grid(filters[:, channel], columns=8, title=title, **scale)
        save_figure(figure, args, f"filters_channel_{channel}.png")

    strongest = filters.abs().amax((1, 2, 3), keepdim=True)  # each filter is shown at full contrast
    title = "The 64 filters of conv1 in colour (grey is zero, each at full contrast)"
    figure = figures.grid(0.5 + filters / (2 * strongest), columns=8, title=title)
    save_figure(figure, args, "filters_rgb.png")
    print(f"64 filters of 7×7×3; the largest weight is {largest:.3f}")


if __name__ == "__main__":
    main()
