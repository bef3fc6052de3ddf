"""What each map of conv5_x is for: the accuracy of every class without it, for each of the maps in turn
(ablation, as in Morcos et al. 2018, https://arxiv.org/abs/1803.06959), and how many can be left out
at little cost. Logits are linear in the maps' means, so one pass over the test set is enough for all.

python -m extras.ablation"""

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint, cli, data, figures, inside, responses
from common.network import network_from_flags
from common.page.client import save_figure

SHOWN = 20  # maps in the figure
TEXT = """On the left, a row is a map and a column a class of the test set; a number is the change of accuracy
without this map, in percentage points, from {:.2%} for all images. Red is a loss: the class relied on the
map. Where a class gains, the network said another class too readily. On the right, maps are left out one
after the other, first those whose absence raises the loss least: {} of {} cost at most a point together."""


def ablate(model, means, labels):
    """What the maps of conv5_x are worth, from their mean activations [maps, N] and labels [N] on the CPU:
    (accuracy 0 … 1 of all images and of each class, with all maps and without each, [1 + maps, 1 +
    classes]; the maps, first those whose absence raises the mean cross-entropy least, int64 [maps]; accuracy
    of all images without the first 0, 1, … of these, [1 + maps])."""
    weight, logits = model.fc.weight.detach().cpu(), inside.logits(model, means)
    by_class = F.one_hot(labels, len(weight)).float()

    def accuracies(logits):
        right = (logits.argmax(1) == labels).float()
        return torch.stack((right.mean(), *(right @ by_class / by_class.sum(0).clamp(min=1))))

    contributions = [mean[:, None] * column for mean, column in zip(means, weight.T)]  # [N, classes] of each
    table = torch.stack([accuracies(logits - part) for part in (torch.zeros(()), *contributions)])
    order = torch.stack([F.cross_entropy(logits - part, labels) for part in contributions]).argsort()
    parts = torch.stack([torch.zeros_like(logits), *(contributions[n] for n in order)]).cumsum(0)
    return table, order, torch.stack([accuracies(logits - part)[0] for part in parts])


def draw_changes(axes, values, rows, columns, label):
    """Draws changes [rows, columns] as numbers, on blue for a gain and red for a loss, with a colour bar."""
    limit = float(values.abs().max()) or 1.0
    shown = axes.imshow(values.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(values.numpy()):
        text, dark = f"{value:+.1f}" if abs(value) >= 0.05 else "0", abs(value) > limit / 2
        options = dict(ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.text(column, row, text, **options)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(shown, ax=axes, label=label, shrink=0.6)


def draw(classes, table, together):
    """(a figure of what `ablate` returned, how many maps nobody would miss, in words)."""
    change, count = 100 * (table[1:] - table[0]), int((together >= together[0] - 0.01).cumprod(0).sum()) - 1
    line = f"{count} of {len(change)} maps together cost at most a point of accuracy"
    order = change[:, 1:].amin(1).argsort()[:SHOWN]  # by the class that loses most
    figure = figures.Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle("What each map of conv5_x is for: how accuracy changes without it")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    names = [f"map {n}" for n in order]
    draw_changes(left, change[order], names, ["all", *classes], "change of accuracy, points")
    left.set_title(f"the {len(order)} maps that a class relies on most", fontsize=10)
    right.plot(100 * together.numpy())
    right.axvline(count, color="grey", lw=0.8, ls="--")
    right.set_title(line.removesuffix(" of accuracy"), fontsize=10)
    right.set(xlabel="maps left out together", ylabel="accuracy of all images, %", ylim=(0, 100))
    right.grid(alpha=0.3)
    return figures.explain(figure, TEXT.format(table[0, 0], count, len(change))), line


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "out", "port").parse_args(argv)
    network = network_from_flags(args)
    dataset, classes = data.load(args.dataset, args.data, network.classes, ["test"]), network.classes
    means = responses.cached_strongest(network, dataset.test_images)["conv5_x"][3]
    table, _, together = ablate(network.model, means, dataset.test_labels)
    names = "left out", "none", *range(len(means))
    rows = [["all", *classes], *([f"{value:.4f}" for value in row] for row in table.tolist())]
    rows = [[name, *row] for name, row in zip(names, rows)]
    print(checkpoint.save_table(rows, cli.make_folder(args.out) / "ablation.csv"))
    figure, line = draw(classes, table, together)
    save_figure(figure, args, "ablation.png")
    losses, labels = (table[0, 1:] - table[1:, 1:]).max(1)
    for n in losses.argsort(descending=True)[:5].tolist():
        (without, whole), name = table[[1 + n, 0], 1 + labels[n]], classes[labels[n]]
        print(f"without map {n}: {name} {without:.1%} instead of {whole:.1%}")
    print(line)


if __name__ == "__main__":
    main()
