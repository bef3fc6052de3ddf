"""Does a reconstruction depend on the network? The same pattern from the trained network and from ones whose
stages are randomised, one more at a time from the top down: if it stays, it depends on the image only
(Adebayo et al. 2018, https://arxiv.org/abs/1810.03292).

python -m extras.sanity_check --layer conv5_x"""

import textwrap
from itertools import islice

from skimage.metrics import structural_similarity

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure

SEEDS = 5  # networks that are randomised in different ways, for each column


def similarity(pattern, other):
    """(rank correlation, SSIM) of two patterns [3, H, W], by their magnitudes, summed over the colours (for
    SSIM, divided by the largest): 1 for the same, and 0 if one of them is empty."""
    if not (pattern.any() and other.any()):
        return 0.0, 0.0
    a, b = (p.abs().sum(0).cpu().numpy() for p in (pattern, other))
    ssim = structural_similarity(a / a.max(), b / b.max(), data_range=1)
    return inside.rank_correlation(pattern, other), float(ssim)


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "layer", "map", "out", "port").parse_args(argv)
    network, _, name, x = from_flags(args)
    (maps,) = inside.feature_maps(network.model, x, args.layer)
    for channel in inside.choose_maps(maps, args.map):
        if not maps[0, channel].any():
            raise cli.UserError(inside.describe_map(maps, args.layer, channel))
        figure, lines, _ = compare(network.model, x, args.layer, channel, name)
        save_figure(figure, args, f"sanity_{args.layer}_map{channel}.png")
        print("\n".join(lines))


def compare(model, x, layer, channel, name, seeds=SEEDS):
    """(a figure of the patterns, a row a method and a column for each further stage that is randomised; lines
    that tell how similar they are to this network's; the mean rank correlation of each method when all stages
    are random). For each column `seeds` networks are randomised in which the map is not silent; the first is
    drawn."""
    stages = inside.STAGES[inside.STAGES.index(layer) :: -1]  # those that the map depends on, from the top
    columns = ["this network", f"{stages[0]} randomised", *(f"and {stage}" for stage in stages[1:])]
    figure = figures.Figure(figsize=(1.75 * len(columns), 6.4), layout="constrained")
    averaged = f"mean and range of {seeds} networks" if seeds > 1 else "of 1 network"
    title = f"What map {channel} of {layer} responded to ({name}), as its network becomes random"
    note = f"(grey is zero; below: rank correlation and SSIM with this network's pattern, {averaged})"
    width = int(11 * figure.get_figwidth())  # characters
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in (title, note)), fontsize=11)
    axes = figure.subplots(len(inside.RELU_BACKWARD), len(columns))
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=10)
    trained, results, last = {}, {}, {}

    def responds(network):
        return bool(inside.feature_maps(network, x, layer)[0][0, channel].any())

    for axis, method in zip(axes[:, 0], inside.RELU_BACKWARD):
        trained[method], results[method] = inside.reconstruct(model, x, layer, channel, method), []
        figures.show(axis, figures.pattern_image(trained[method]))
        axis.set_ylabel(inside.METHOD_NAMES[method])
        axis.set_xlabel(figures.describe_scale(trained[method]), fontsize=8)
    for n, column in enumerate(columns[1:], 1):
        random = (inside.randomize(model, stages[:n], seed) for seed in range(10 * seeds))
        networks = list(islice(filter(responds, random), seeds)) or [inside.randomize(model, stages[:n])]
        for axis, method in zip(axes[:, n], trained):
            patterns = [inside.reconstruct(network, x, layer, channel, method) for network in networks]
            figures.show(axis, figures.pattern_image(patterns[0]))
            measures = list(zip(*(similarity(trained[method], pattern) for pattern in patterns)))
            last[method] = sum(measures[0]) / len(networks)
            ranges = [f" ({min(v):.2f}–{max(v):.2f})" if seeds > 1 else "" for v in measures]
            rank, ssim = (f"{sum(v) / len(networks):.2f}{ends}" for v, ends in zip(measures, ranges))
            axis.set_xlabel(f"{figures.describe_scale(patterns[0])}\nrank {rank}\nSSIM {ssim}", fontsize=8)
            results[method].append(f"{column} {rank} {ssim}")
    lines = [f"{name}, rank correlation and SSIM: {', '.join(t)}" for name, t in results.items()]
    return figure, lines, last


if __name__ == "__main__":
    main()
