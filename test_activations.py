"""Figures 8.4.1, 8.4.2: column charts of how strongly each map of conv1 and conv5_x responds to an image."""

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "out", "port").parse_args(argv)
    network, _, name, x = from_flags(args)

    for layer, maps in zip(("conv1", "conv5_x"), inside.feature_maps(network.model, x, "conv1", "conv5_x")):
        figure, bars, strongest = figures.activation_chart(maps, layer, name)
        save_figure(figure, args, f"activations_{layer}.png", bars)
        print(f"{layer}: the strongest is map {strongest}, mean activation {bars[1][strongest]:.4f}")


if __name__ == "__main__":
    main()
