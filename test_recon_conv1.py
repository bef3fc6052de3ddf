"""Figure 8.5.1: what a feature map of conv1 responded to in an image, reconstructed by backpropagation."""

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure

LAYER = "conv1"


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "map", "method", "out", "port").parse_args(argv)
    network, image, name, x = from_flags(args)

    (maps,) = inside.feature_maps(network.model, x, LAYER)
    for channel in inside.choose_maps(maps, args.map):
        pattern = inside.reconstruct(network.model, x, LAYER, channel, args.method)
        control = inside.control(network.model, x, pattern, LAYER, channel, args.method)
        figure = figures.reconstruction(image, name, maps, pattern, LAYER, channel, args.method, control)
        save_figure(figure, args, f"recon_{LAYER}_map{channel}_{args.method}.png")
        print(f"{inside.describe_map(maps, LAYER, channel)}. {inside.describe_control(LAYER, control[1])}")


if __name__ == "__main__":
    main()
