"""The pattern in an image that a feature map responded to, reconstructed by backpropagation: of any layer,
map, image and method, from the whole map or from its strongest position.

python -m extras.reconstruct --layer conv3_x --map strongest:3 --unit max"""

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "data", "image", "map", "method", "out", "port")
    add = parser.add_argument
    add("--layer", default="conv5_x", help="a stage, conv1 to conv5_x, or a module as conv3_x.block1.conv2")
    add("--unit", default="map", choices=["map", "max"], help="from the whole map, or its strongest position")
    args = parser.parse_args(argv)
    network, image, name, x = from_flags(args)

    inside.check_layer(network.model, args.layer)
    (maps,) = inside.feature_maps(network.model, x, args.layer)
    for channel in inside.choose_maps(maps, args.map):
        how = args.layer, channel, args.method
        pattern = inside.reconstruct(network.model, x, *how, args.unit)
        control = inside.control(network.model, x, pattern, *how, args.unit)
        if args.unit == "map":
            figure = figures.reconstruction(image, name, maps, pattern, *how, control)
        else:
            figure = figures.close_up(image, name, pattern, *how, control)
        end = "" if args.unit == "map" else "_max"
        save_figure(figure, args, f"recon_{args.layer}_map{channel}_{args.method}{end}.png")
        verdict = inside.describe_control(args.layer, control[1])
        print(f"{inside.describe_map(maps, args.layer, channel)}. {verdict}")


if __name__ == "__main__":
    main()
