"""Figure 8.5.1: the pattern in a picture that one feature map of conv1 responded to, reconstructed by
backpropagation."""

from common import cli, figures, inside


def draw(layer, description, argv):
    """Reconstructs from one map of `layer` as the flags in `argv` say, and draws the figure."""
    flags = "weights", "dataset", "data", "image", "map", "method", "out", "device"
    args = cli.parser(description, *flags).parse_args(argv)
    network, picture, name, x = inside.from_flags(args)

    (maps,) = inside.feature_maps(network.model, x, layer)
    number = inside.choose_map(maps, args.map)
    pattern = inside.reconstruct(network.model, x, layer, number, args.method)
    figure = figures.picture_and_pattern(
        picture,
        maps[0, number],
        pattern,
        title=f"What map {number} of {layer} responded to",
        captions=(
            name,
            f"map {number} of {layer}, mean activation {inside.strengths(maps)[number]:.3f}",
            f"the pattern, by {inside.METHOD_NAMES[args.method]}",
        ),
    )
    figures.save(figure, args.out, f"recon_{layer}_map{number}_{args.method}.png")
    if not pattern.any():
        print(f"map {number} of {layer} is silent on this picture, so there is no pattern: choose another")


@cli.command
def main(argv=None):
    draw("conv1", __doc__, argv)


if __name__ == "__main__":
    main()
