"""Which evidence to believe: how fast the probability of the class that the network says falls as the pixels
with the most evidence for it are blurred away, against pixels in random order (the deletion curve of Petsiuk
et al. 2018, https://arxiv.org/abs/1806.07421).

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
area under the curve is small. A method is to be believed as far as its curve is below the dashed one, where
the order is random. Curves are means; ± is the standard deviation of the area among images."""


@torch.no_grad()
def curve(network, image, evidence, label):
    """The probabilities [STEPS + 1] of class `label` as the pixels of `image`, uint8 [3, 32, 32], are
    blurred, those with the highest `evidence` [H, W] first."""
    evidence = F.interpolate(evidence[None, None].float(), image.shape[1:], mode="area")
    side = image.shape[1]
    rank = evidence.flatten().argsort(descending=True).argsort().view_as(evidence)
    ends = torch.arange(STEPS + 1, device=rank.device).view(-1, 1, 1, 1) * (rank.numel() / STEPS)
    images = torch.where(
        rank < ends, gaussian_blur(image.float(), 6 * (side // 8) + 1, side / 8), image.float()
    )
    return network.model(network.preprocess(images)).float().softmax(1)[:, label].cpu()


def measure(network, images):
    """{method: its curves [N, STEPS + 1]} for METHODS and the random order, and images uint8 [N, 3, 32,
    32]."""
    generator, device = torch.Generator().manual_seed(0), network.model.fc.weight.device
    methods = METHODS | {"random order": lambda model, x, label: torch.rand(x.shape[2:], generator=generator)}
    curves = {method: [] for method in methods}
    for image in cli.progress_bar(images.to(device), "blurring the evidence away"):
        x = network.preprocess(image)
        label = int(network.model(x).argmax())
        for method, evidence in methods.items():
            evidence = evidence(network.model, x, label).to(device)
            curves[method].append(curve(network, image, evidence, label))
    return {method: torch.stack(found) for method, found in curves.items()}


def summary(curves):
    """{method: (the mean area under its curves; their standard deviation; in how many of the images it is
    smaller than in random order)}, all 0 … 1."""
    areas = {method: torch.trapezoid(found.double(), dx=1 / STEPS) for method, found in curves.items()}
    smaller = {method: (area < areas["random order"]).double().mean() for method, area in areas.items()}
    return {
        m: (float(area.mean()), float(area.std(correction=0)), float(smaller[m])) for m, area in areas.items()
    }


def draw(curves):
    """A figure of the mean curves."""
    axes = figures.Figure(figsize=(9, 6.2), layout="constrained").subplots()
    for method, (area, spread, _) in summary(curves).items():
        style = dict(color="black", ls="--") if method == "random order" else {}
        label = f"{method}: area {area:.3f} ± {spread:.3f}"
        axes.plot(torch.linspace(0, 100, STEPS + 1), curves[method].mean(0), label=label, **style)
    axes.set(xlabel="pixels blurred, %", ylabel="probability of the class", ylim=(0, 1), xlim=(0, 100))
    axes.set_title(
        f"Probability of the class as its evidence is blurred ({len(curves['occlusion'])} test images)"
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figures.explain(axes.figure, TEXT)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "dataset", "data", "out", "device", "port")
    whole = cli.number(int, 1)
    parser.add_argument(
        "--count", type=whole, default=100, metavar="N", help="how many images (default: 100)"
    )
    args = parser.parse_args(argv)
    network = network_from_flags(args)
    images = data.load(args.dataset, args.data, network.classes, ["test"]).test_images[: args.count]
    curves = measure(network, images)
    rows = [[method, *(f"{value:.3f}" for value in values)] for method, values in summary(curves).items()]
    rows.insert(0, ["evidence", "area", "standard deviation", "smaller than random"])
    checkpoint.save_table(rows, cli.make_folder(args.out) / "deletion.csv")
    save_figure(draw(curves), args, "deletion.png")
    for cells in rows:
        print("{:<21} {:>6} {:>19} {:>20}".format(*cells))


if __name__ == "__main__":
    main()
