"""Figures 8.4.1 and 8.4.2: how strongly each feature map responds to a picture, as column charts, for
conv1 and the last layer of conv5_x."""

from common import cli, figures, inside


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "image", "out", "device", "port")
    args = parser.parse_args(argv)
    network, _, name, x = inside.from_flags(args)

    for layer, maps in zip(("conv1", "conv5_x"), inside.feature_maps(network.model, x, "conv1", "conv5_x")):
        strengths = inside.strengths(maps)
        strongest = inside.choose_map(maps)
        title = f"How strongly each of the {len(strengths)} maps of {layer} responds ({name})"
        figure = figures.column_chart(strengths, strongest, title, label="mean activation")
        bars = title, strengths, "mean activation"
        figures.save(figure, args, f"activations_{layer}.png", bars)
        print(f"{layer}: the strongest is map {strongest}, mean activation {strengths[strongest]:.4f}")


if __name__ == "__main__":
    main()
