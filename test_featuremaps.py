"""Figures 8.1 to 8.3: a picture, its 64 feature maps in conv1, and its 512 in the last layer of conv5_x."""

from common import cli, figures, inside


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "image", "out", "device", "port")
    args = parser.parse_args(argv)
    network, picture, name, x = inside.from_flags(args)

    figure = figures.picture(picture, name, inside.prediction(network, x))
    figures.save(figure, args, "picture.png")
    for layer, maps in zip(("conv1", "conv5_x"), inside.feature_maps(network.model, x, "conv1", "conv5_x")):
        count, height, width = maps.shape[1:]
        columns = 8 if count == 64 else 32
        title = f"The {count} feature maps of {layer}, {height}×{width} each ({name})"
        label = "activation (one scale, to the 99.5th percentile)"
        figure = figures.grid(maps[0], columns, title, maps.quantile(0.995), label)
        figures.save(figure, args, f"featuremaps_{layer}.png")


if __name__ == "__main__":
    main()
