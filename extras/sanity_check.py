"""Does a reconstruction tell about the network? The same pattern from the trained network and from ones
whose stages are randomised, one more at a time from the top down: if it stays, it tells about the picture
only (Adebayo et al. 2018, https://arxiv.org/abs/1810.03292).

python -m extras.sanity_check --layer conv5_x"""

import copy

import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from common import cli, figures, inside
from MyResnet import ResNet18

SEEDS = 5  # networks that are randomised in different ways, for each column


def randomised(model, stages, seed=0):
    """A copy of the network with those stages as before training."""
    torch.manual_seed(seed)
    model, new = copy.deepcopy(model), ResNet18(model.fc.out_features)
    for stage in stages:
        model.get_submodule(stage).load_state_dict(new.get_submodule(stage).state_dict())
    return model.eval()


def similarity(pattern, other):
    """(rank correlation, SSIM) of the magnitudes of two patterns [3, H, W], each summed over the colours and
    divided by its largest value: 1 for the same, and 0 if one of them is empty."""
    if not (pattern.any() and other.any()):
        return 0.0, 0.0
    a, b = (p.abs().sum(0).cpu().numpy() for p in (pattern, other))
    a, b = a / a.max(), b / b.max()
    return float(spearmanr(a, b, axis=None).statistic), float(structural_similarity(a, b, data_range=1))


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "image", "map", "out", "device", "port")
    parser.add_argument("--layer", default="conv5_x", choices=inside.STAGES, help="default: conv5_x")
    args = parser.parse_args(argv)
    network, _, name, x = inside.from_flags(args)
    number = inside.choose_map(inside.feature_maps(network.model, x, args.layer)[0], args.map)
    layer = inside.STAGES.index(args.layer)
    stages = inside.STAGES[layer::-1]  # those that the map depends on, from the top
    columns = ["trained", f"{stages[0]} randomised", *(f"and {stage}" for stage in stages[1:])]

    figure = figures.Figure(figsize=(1.75 * len(columns), 6.4), layout="constrained")
    figure.suptitle(
        f"What map {number} of {args.layer} responded to ({name}), as its network becomes random\n"
        f"(grey is zero; rank correlation and SSIM with the trained one's: mean, range of {SEEDS} networks)",
        fontsize=11,
    )
    axes = figure.subplots(len(inside.RELU_BACKWARD), len(columns))
    said = {method: [] for method in inside.RELU_BACKWARD}
    trained = {}
    for count, (column, axes_of_column) in enumerate(zip(columns, axes.T)):
        axes_of_column[0].set_title(column, fontsize=10)
        models = [randomised(network.model, stages[:count], seed) for seed in range(SEEDS if count else 1)]
        for method, axis in zip(inside.RELU_BACKWARD, axes_of_column):
            patterns = [inside.reconstruct(model, x, args.layer, number, method) for model in models]
            figures.show(axis, figures.neutral(patterns[0]))
            if not count:
                trained[method] = patterns[0]
                axis.set_ylabel(inside.METHOD_NAMES[method])
                if not patterns[0].any():
                    raise cli.UserError(f"map {number} of {args.layer} is silent here: choose another")
                continue
            likeness = zip(*(similarity(trained[method], pattern) for pattern in patterns))
            rank, ssim = (f"{sum(v) / len(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in likeness)
            axis.set_xlabel(f"rank {rank}\nSSIM {ssim}", fontsize=8)
            said[method].append(f"{column} {rank} {ssim}")
    for method, texts in said.items():
        print(f"{method}, rank correlation and SSIM: {', '.join(texts)}")
    figures.save(figure, args, f"sanity_{args.layer}_map{number}.png")


if __name__ == "__main__":
    main()
