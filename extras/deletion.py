"""Which evidence to believe: how fast the probability of the predicted class falls as the pixels with the
most evidence for it are blurred away, compared with a random order (after the deletion curve of Petsiuk et
al. 2018, https://arxiv.org/abs/1806.07421, who set them to 0; blurred pixels add no edges).

python -m extras.deletion"""

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from common import checkpoint, cli, data, figures
from common.network import network_from_flags
from common.page.client import save_figure
from extras.attribution import METHODS

STEPS = 16  # in which all pixels are blurred
TEXT = """Each method orders the pixels of an image by their evidence for the class that the network says, and
they are blurred in that order. If it finds what the network relies on, the probability falls early, and the
area under the curve is small. The further its curve lies below the dashed one, whose order is random, the
more a method can be trusted. Curves are means; ± is the standard deviation of the area among images."""


@torch.no_grad()
def curve(network, image, evidence, label):
    """The probabilities [STEPS + 1] of class `label` as the pixels of `image`, uint8 [3, 32, 32] on the CPU,
    are blurred, those with the highest `evidence` [h, w] first."""
    side, evidence = image.shape[1], evidence[None, None].float().cpu()
    evidence = F.interpolate(evidence, (side, side), mode="bilinear", antialias=True)
    rank = evidence.flatten().argsort(descending=True).argsort().view_as(evidence)
    ends = torch.arange(STEPS + 1).view(-1, 1, 1, 1) * (rank.numel() / STEPS)
    blurred = gaussian_blur(image.float(), 6 * (side // 8) + 1, side / 8)
    images = torch.where(rank < ends, blurred, image.float())
    return network.model(network.preprocess(images)).float().softmax(1)[:, label].cpu()


def measure(network, images):
    """{method: curves [N, STEPS + 1]} for METHODS and the random order, of images uint8 [N, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(0)
    methods = METHODS | {"random order": lambda model, x, label: torch.rand(x.shape[2:], generator=generator)}
    curves = {method: [] for method in methods}
    for image in cli.progress_bar(images, "blurring the evidence away"):
        x = network.preprocess(image)
        label = int(network.model(x).argmax())
        for method, function in methods.items():
            curves[method].append(curve(network, image, function(network.model, x, label), label))
    return {method: torch.stack(found) for method, found in curves.items()}


def summary(curves):
    """{method: (the mean area under its curves; their standard deviation; in how many of the images it is
    smaller than in random order)}, all 0 … 1."""
    areas = {method: torch.trapezoid(found.double(), dx=1 / STEPS) for method, found in curves.items()}
    chance = areas["random order"]
    rows = ((a.mean(), a.std(correction=0), (a < chance).double().mean()) for a in areas.values())
    return {method: tuple(map(float, row)) for method, row in zip(areas, rows)}


def draw(curves):
    """A figure of the mean curves."""
    axes = figures.Figure(figsize=(9, 6.2), layout="constrained").subplots()
    for (method, found), (area, spread, _) in zip(curves.items(), summary(curves).values()):
        style = dict(color="black", ls="--") if method == "random order" else {}
        label = f"{method}: area {area:.3f} ± {spread:.3f}"
        axes.plot(torch.linspace(0, 100, STEPS + 1), found.mean(0), label=label, **style)
    axes.set(xlabel="pixels blurred, %", ylabel="probability of the class", ylim=(0, 1), xlim=(0, 100))
    axes.set_title(f"Probability of the class as its evidence is blurred ({len(found)} test images)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figures.explain(axes.figure, TEXT)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "data", "out", "port")
    parser.add_argument("--count", type=cli.number(int, 1), default=100, help="test images (default: 100)")
    args = parser.parse_args(argv)
    network = network_from_flags(args)
    images = data.load(args.dataset, args.data, network.classes, ["test"]).test_images[: args.count]
    curves = measure(network, images)
    rows = [[method, *(f"{value:.3f}" for value in values)] for method, values in summary(curves).items()]
    rows.insert(0, ["evidence", "area", "standard deviation", "smaller than random"])
    print(checkpoint.save_table(rows, cli.make_folder(args.out) / "deletion.csv"))
    save_figure(draw(curves), args, "deletion.png")
    for cells in rows:
        print("{:<21} {:>6} {:>19} {:>20}".format(*cells))


if __name__ == "__main__":
    main()
