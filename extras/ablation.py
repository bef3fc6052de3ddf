"""What each map of conv5_x is for: the accuracy of every class without it, for each of the maps in turn
(ablation, as in Morcos et al. 2018, https://arxiv.org/abs/1803.06959). Logits are linear in the maps' means,
so that one pass over the test set is enough for all.

python -m extras.ablation"""

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint, cli, data, figures, responses
from common.network import network_from_flags
from common.page.client import save_figure

SHOWN = 20  # maps in the figure
TEXT = """On the left, a row is a map, a column is a class of the test set, and a number says how many more or
fewer of a hundred images are right without this map, of {:.2%} with all. Red is a loss: the class relied on
the map. Where a class gains, the network said another class too readily. On the right, {} maps cost nothing
when each is left out alone, since others do the same work: left out all at once, they leave {:.2%}."""


def accuracies(model, means, labels, left_out):
    """Accuracy 0 … 1 of all images and of those of each class, [1 + classes], without the maps in `left_out`:
    from the mean activations [maps, N] of conv5_x and the labels [N], on the CPU."""
    weight, bias = model.fc.weight.detach().cpu(), model.fc.bias.detach().cpu()
    logits = means.T @ weight.T + bias - means[left_out].T @ weight[:, left_out].T
    right, by_class = (logits.argmax(1) == labels).float(), F.one_hot(labels, len(weight)).float()
    return torch.cat((right.mean()[None], right @ by_class / by_class.sum(0).clamp(min=1)))


def ablate(model, means, labels):
    """(`accuracies` without none and without each of the maps, [1 + maps, 1 + classes]; the maps that cost
    nothing, each alone; the accuracy of all images without all of these)."""
    table = [accuracies(model, means, labels, maps) for maps in ([], *([n] for n in range(len(means))))]
    table = torch.stack(table)
    spare = (table[1:, 0] >= table[0, 0]).nonzero().flatten().tolist()
    return table, spare, float(accuracies(model, means, labels, spare)[0])


def draw(classes, table, spare, without_spare):
    """A figure of what `ablate` returned."""
    change = 100 * (table[1:] - table[0])
    order = change[:, 1:].amin(1).argsort()[:SHOWN]  # by the class that loses most
    figure = figures.Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle("What each map of conv5_x is for: how accuracy changes without it")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    limit = float(change[order].abs().max()) or 1.0
    shown = left.imshow(change[order].numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(change[order].numpy()):
        color = "white" if abs(value) > limit / 2 else "black"
        left.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=color)
    left.set_xticks(range(1 + len(classes)), ["all", *classes], rotation=45, ha="right")
    left.set_yticks(range(len(order)), [f"map {n}" for n in order])
    left.set_title(f"the {len(order)} maps that a class relies on most", fontsize=10)
    figure.colorbar(shown, ax=left, label="change of accuracy, points", shrink=0.6)
    right.plot(change[:, 0].sort().values.numpy())
    right.axhline(0, color="grey", lw=0.8)
    right.set(xlabel="maps, in the order of their loss", ylabel="change of accuracy of all images, points")
    right.set_title(f"{len(spare)} of {len(change)} maps cost nothing, each alone", fontsize=10)
    return figures.explain(figure, TEXT.format(table[0, 0], len(spare), without_spare))


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "dataset", "data", "out", "device", "port").parse_args(argv)
    network = network_from_flags(args)
    dataset, classes = data.load(args.dataset, args.data, network.classes, ["test"]), network.classes
    means = responses.cached_strongest(network, dataset.test_images)["conv5_x"][3]
    table, spare, without_spare = ablate(network.model, means, dataset.test_labels)
    rows = [[f"{value:.4f}" for value in row] for row in table.tolist()]
    rows = [[name, *row] for name, row in zip(["none", *range(len(means))], rows)]
    checkpoint.save_table([["left out", "all", *classes], *rows], cli.make_folder(args.out) / "ablation.csv")
    save_figure(draw(classes, table, spare, without_spare), args, "ablation.png")
    losses = table[0, 1:] - table[1:, 1:]
    for n in losses.amax(1).argsort(descending=True)[:5].tolist():
        label = int(losses[n].argmax())
        print(
            f"without map {n}: {classes[label]} {table[1 + n, 1 + label]:.1%}, not {table[0, 1 + label]:.1%}"
        )
    cost = f"{len(spare)} of {len(means)} maps cost nothing, each alone"
    print(f"{cost}; without all of them: {without_spare:.2%}, not {table[0, 0]:.2%}")


if __name__ == "__main__":
    main()
