"""Figures 7.1 to 7.3: the 64 filters of conv1, one grid for each input channel, and in colour."""

from common import cli, figures
from common.network import network_from_flags
from common.page.client import save_figure


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "out", "port").parse_args(argv)
    network = network_from_flags(args)
    filters = network.model.conv1.conv.weight.detach().cpu()  # [64, 3, 7, 7], as trained

    for name, figure in figures.filter_grids(filters):
        save_figure(figure, args, f"filters_{name}.png")
    print(f"64 filters of 7×7×3; the largest weight in magnitude is {filters.abs().max():.3f}")


if __name__ == "__main__":
    main()
