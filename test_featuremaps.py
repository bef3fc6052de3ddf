"""Figures 8.1 to 8.3: an image, its 64 feature maps in conv1, and its 512 in the last layer of conv5_x."""

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "out", "port").parse_args(argv)
    network, image, name, x = from_flags(args)

    figure = figures.side_by_side([image], [network.prediction(x)], title=name)
    save_figure(figure, args, "image.png")
    for layer, maps in zip(("conv1", "conv5_x"), inside.feature_maps(network.model, x, "conv1", "conv5_x")):
        save_figure(figures.map_grid(maps, layer, name), args, f"featuremaps_{layer}.png")


if __name__ == "__main__":
    main()
