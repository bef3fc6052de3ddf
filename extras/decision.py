"""Why this class and not another? After conv5_x there are only average pooling and fc, so a class's logit is
exactly a bias and what each map adds, its mean activation times a weight (Zhou et al. 2015,
https://arxiv.org/abs/1512.04150, section 2).

python -m extras.decision --image 15 --class cat"""

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure

TEXT = """Each column of the charts is one map of conv5_x: its mean activation times its weight in fc. They
and a bias add up to the class's logit exactly, and the class with the largest logit is what the network says.
Below: the three maps that speak most for {} and against {}, then the one that speaks most the other way; the
pattern that each responds to, by guided backpropagation; and as a control the same from this network with
random upper stages. If their rank correlation is above 0.6, the pattern mostly shows edges and areas of the
image."""


def decide(model, x, labels):
    """(maps of conv5_x [1, 512, h, w], logits of the two classes in `labels` [2], what each map adds to them
    [2, 512], four maps: the three that speak most for the first class, the one that does for the second)."""
    maps, logits = inside.feature_maps(model, x, "conv5_x", "fc")
    parts = inside.contributions(model, inside.mean_activations(maps))[labels]
    order = (parts[0] - parts[1]).argsort(descending=True).tolist()
    return maps.detach(), logits[0, labels].detach(), parts, [*order[:3], order[-1]]


def draw(network, image, name, x, names=()):
    """(a figure of the account, what it says in lines) of the class that the network says, against the one in
    `names`, or what the test image is, or the second most probable. Raises `UserError`."""
    model, classes = network.model, network.classes
    probabilities = model(x)[0].detach().softmax(0)
    predicted, truth = classes[probabilities.argmax()], name.partition(": ")[2]
    names = names or [c for c in classes if c == truth != predicted]
    labels = inside.choose_classes(probabilities, classes, names)
    if len(labels) != 2:
        raise cli.UserError(f"the network says {predicted}: --class takes one other class")
    maps, logits, parts, strongest = decide(model, x, labels)
    a, b = (classes[label] for label in labels)
    figure, lines = figures.Figure(figsize=(13, 12.5), layout="constrained"), []
    figure.suptitle(f"Why the network says {a} and not {b} ({name})")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    for axes, label, part, logit in zip(upper.subplots(2, 1, sharey=True), labels, parts, logits):
        sums = f"{part.sum():+.3f} from {len(part)} maps, {model.fc.bias[label]:+.3f} bias"
        lines.append(f"{classes[label]}: logit {logit:.3f} = {sums}")
        figures.draw_columns(axes, part, strongest, lines[-1], "added to the logit", "{}")
    cells = lower.subplots(3, 1 + len(strongest))
    figures.show(cells[0, 0], image)
    cells[0, 0].set_xlabel(name)
    for axes in cells[1:, 0]:
        axes.set_axis_off()
    for channel, (top, middle, bottom) in zip(strongest, cells[:, 1:].T):
        row = maps[0, channel]
        figures.show(top, row[None], cmap="inferno", vmin=0, vmax=float(row.max()) or 1.0)
        top.set_xlabel(f"map {channel}, brightest at {row.max():.2f}")
        pattern = inside.reconstruct(model, x, "conv5_x", channel)
        figures.show(middle, figures.pattern_image(pattern))
        middle.set_xlabel(f"pattern, {figures.describe_scale(pattern)}")
        control, correlation = inside.control(model, x, pattern, "conv5_x", channel)
        figures.show(bottom, figures.pattern_image(control))
        scale = figures.describe_scale(control)
        bottom.set_xlabel(f"control, {scale}\nrank correlation {correlation:.2f}")
        for_a, for_b = parts[:, channel]
        top.set_title(f"{a} {for_a:+.3f}, {b} {for_b:+.3f}", fontsize=10)
        lines.append(f"map {channel}: {a} {for_a:+.3f}, {b} {for_b:+.3f}")
    return figures.explain(figure, TEXT.format(a, b)), lines


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "class", "out", "port").parse_args(argv)
    figure, lines = draw(*from_flags(args), args.names)
    save_figure(figure, args, "decision.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
