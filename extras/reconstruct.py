"""The pattern in a picture that a feature map responded to, reconstructed by backpropagation: of any layer,
map, picture and method, from the whole map or from its strongest position.

python -m extras.reconstruct --layer conv3_x --map strongest:3 --unit max"""

from matplotlib.patches import Rectangle

from common import cli, figures, inside

FLAGS = "weights", "dataset", "data", "image", "method", "out", "device", "port"


def draw(args, layer, wanted, unit="map"):
    """Draws the figure of each map of `layer` that is `wanted` (see `inside.choose_maps`), by `unit`."""
    network, picture, name, x = inside.from_flags(args)
    inside.check_layer(network.model, layer)
    (maps,) = inside.feature_maps(network.model, x, layer)
    for number in inside.choose_maps(maps, wanted):
        pattern = inside.reconstruct(network.model, x, layer, number, args.method, unit)
        strength = inside.strengths(maps)[number]
        title = f"What map {number} of {layer} responded to"
        how = f"the pattern, by {inside.METHOD_NAMES[args.method]}\n(grey is zero)"
        if unit == "map":
            captions = name, f"map {number} of {layer}, mean activation {strength:.3f}", how
            figure = figures.picture_and_pattern(picture, maps[0, number], pattern, title, captions)
        else:
            box = inside.smallest_box(pattern)
            figure = close_up(picture, pattern, box, f"{title} at its strongest position", name, how)
        end = "" if unit == "map" else "_max"
        figures.save(figure, args, f"recon_{layer}_map{number}_{args.method}{end}.png")
        if not pattern.any():
            print(
                f"map {number} of {layer} is silent on this picture, so there is no pattern: choose another"
            )


def close_up(picture, pattern, box, title, name, how):
    """A figure of the picture, uint8 [3, S, S], with `box` (top, left, bottom, right in the pixels of the
    pattern [3, H, W]), of that part of it enlarged, and of the pattern there."""
    figure = figures.Figure(figsize=(11, 4.3), layout="constrained")
    axes = figure.subplots(1, 3)
    top, left, bottom, right = box
    extent = -0.5, pattern.shape[2] - 0.5, pattern.shape[1] - 0.5, -0.5
    for axis in axes[:2]:
        figures.show(axis, picture, extent=extent)
    axes[0].add_patch(
        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec="red", lw=2)
    )
    figures.show(axes[2], figures.neutral(pattern))
    for axis in axes[1:]:
        axis.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
    size = "{}×{} of {}×{} px".format(right - left, bottom - top, *pattern.shape[:0:-1])
    for axis, caption in zip(axes, (name, f"where 90 % of the pattern is\n({size})", how)):
        axis.set_xlabel(caption)
    figure.suptitle(title)
    return figure


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, *FLAGS)
    add = parser.add_argument
    add("--layer", default="conv5_x", help="a stage, conv1 to conv5_x, or a module as conv3_x.block1.conv2")
    add("--map", default="strongest:1", metavar="N", help="a map, several as 7,43, or strongest:K")
    add("--unit", default="map", choices=["map", "max"], help="from the whole map, or its strongest position")
    args = parser.parse_args(argv)
    draw(args, args.layer, args.map, args.unit)


if __name__ == "__main__":
    main()
