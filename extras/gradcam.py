"""The evidence for a class in an image: Grad-CAM over conv5_x (Selvaraju et al. 2016,
https://arxiv.org/abs/1610.02391), for what the network says and for any other class.

python -m extras.gradcam --image 15 --class cat --class horse"""

import torch

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure


def gradcam(model, x, label):
    """Where in the image `x`, [1, 3, H, W] normalised, the evidence for class `label` is: [h, w], the maps of
    conv5_x, each weighted by the mean gradient of the class's logit, and of their sum what is positive."""
    maps, logits = inside.feature_maps(model, x, "conv5_x", "fc")
    (gradient,) = torch.autograd.grad(logits[0, label], maps)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1)[0].relu().detach()


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "image", "out", "device", "port")
    parser.add_argument("--class", dest="names", action="append", default=[], metavar="NAME",
        help="a further class (default: the second most probable)")  # fmt: skip
    args = parser.parse_args(argv)
    network, image, name, x = from_flags(args)
    probabilities = network.model(x)[0].softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    if unknown := set(args.names) - set(network.classes):
        raise cli.UserError(f"no class {unknown.pop()!r}: --class takes {', '.join(network.classes)}")
    others = [network.classes.index(other) for other in args.names] or order[1:2]
    labels = list(dict.fromkeys([order[0], *others]))
    captions = [f"for {network.classes[n]} (probability {probabilities[n]:.1%})" for n in labels]
    evidence = [gradcam(network.model, x, label).cpu() for label in labels]

    grey = (image.float().mean(0, keepdim=True) / 255).expand(3, -1, -1)
    images, title = [image, *[grey] * len(labels)], "Where the evidence for a class is in the image"
    figure = figures.side_by_side(images, [name, *captions], title)
    largest = float(torch.stack(evidence).max()) or 1.0  # one scale
    options = dict(cmap="inferno", alpha=0.6, vmin=0, vmax=largest, interpolation="bilinear")
    for axes, heat in zip(figure.axes[1:], evidence):
        shown = axes.imshow(heat.numpy(), extent=axes.images[0].get_extent(), **options)
    figure.colorbar(shown, ax=axes, label="evidence (one scale)", shrink=0.7)
    save_figure(figure, args, "gradcam.png")


if __name__ == "__main__":
    main()
