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
    flags = "weights", "dataset", "data", "image", "map", "out", "device", "port"
    parser = cli.parser(__doc__, *flags)
    parser.add_argument(
        "--layer", default="conv5_x", choices=inside.STAGES, help="of the map (default: conv5_x)"
    )
    args = parser.parse_args(argv)
    network, _, name, x = inside.from_flags(args)
    number = inside.choose_map(inside.feature_maps(network.model, x, args.layer)[0], args.map)
    stages = inside.STAGES[
        inside.STAGES.index(args.layer) :: -1
    ]  # those that the map depends on, from the top
    networks = [randomised(network.model, stages[:count]) for count in range(len(stages) + 1)]
    columns = ["trained", f"{stages[0]} randomised", *(f"and {stage}" for stage in stages[1:])]

    figure = figures.Figure(figsize=(2 * len(columns), 6.8), layout="constrained")
    figure.suptitle(f"What map {number} of {args.layer} responded to ({name}), as its network becomes random")
    axes = figure.subplots(len(inside.RELU_BACKWARD), len(columns))
    for row, method in zip(axes, inside.RELU_BACKWARD):
        patterns = [inside.reconstruct(model, x, args.layer, number, method) for model in networks]
        if not patterns[0].any():
            raise cli.UserError(f"map {number} of {args.layer} is silent on this picture: choose another")
        row[0].set_ylabel(inside.METHOD_NAMES[method])
        said = []
        for axis, column, pattern in zip(row, columns, patterns):
            figures.show(axis, figures.neutral(pattern))
            rank, ssim = similarity(patterns[0], pattern)
            axis.set_xlabel(f"rank correlation {rank:.2f}\nSSIM {ssim:.2f}", fontsize=8)
            said.append(f"{column} {rank:.2f} {ssim:.2f}")
        print(f"{method}, rank correlation and SSIM: {', '.join(said[1:])}")
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=10)
    figures.save(figure, args, f"sanity_{args.layer}_map{number}.png")


if __name__ == "__main__":
    main()
