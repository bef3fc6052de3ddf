"""The evidence for a class in a picture: Grad-CAM over conv5_x (Selvaraju et al. 2016,
https://arxiv.org/abs/1610.02391), for what the network says and for any other class.

python -m extras.gradcam --image 15 --class cat --class horse"""

import torch
import torch.nn.functional as F

from common import cli, figures, inside


def gradcam(model, x, number, layer="conv5_x"):
    """Where in the picture `x`, [1, 3, H, W] normalised, the evidence for class `number` is: [h, w], the maps
    of `layer`, each weighted by the mean gradient of the class's logit, and of their sum what is positive."""
    maps, logits = inside.feature_maps(model, x.detach().requires_grad_(), layer, "fc")
    (gradient,) = torch.autograd.grad(logits[0, number], maps)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1)[0].relu().detach()


def draw(picture, evidence, titles, name):
    """A figure of the picture, uint8 [3, S, S], and over it each of `evidence`, [h, w] on one scale."""
    figure = figures.Figure(figsize=(3.6 * (1 + len(evidence)) + 0.8, 4.2), layout="constrained")
    figure.suptitle("Where the evidence for a class is in the picture")
    axes = figure.subplots(1, 1 + len(evidence))
    figures.show(axes[0], picture)
    axes[0].set_title(name, fontsize=10)
    largest = max(float(map.max()) for map in evidence) or 1.0
    extent = -0.5, picture.shape[2] - 0.5, picture.shape[1] - 0.5, -0.5
    for axis, map, title in zip(axes[1:], evidence, titles):
        figures.show(axis, picture.float().mean(0, keepdim=True).expand(3, -1, -1) / 255)
        smooth = F.interpolate(map[None, None], (224, 224), mode="bilinear")[0, 0].cpu().numpy()
        shown = axis.imshow(smooth, cmap="inferno", alpha=0.6, vmin=0, vmax=largest, extent=extent)
        axis.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=axes[-1], label="evidence (one scale)", shrink=0.7)
    return figure


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "image", "out", "device", "port")
    parser.add_argument("--class", dest="names", action="append", default=[], metavar="NAME",
        help="a further class (default: the second most probable)")  # fmt: skip
    args = parser.parse_args(argv)
    network, picture, name, x = inside.from_flags(args)
    with torch.no_grad():
        probabilities = network.model(x)[0].softmax(0)
    order = probabilities.argsort(descending=True).tolist()
    for wrong in set(args.names) - set(network.classes):
        raise cli.UserError(f"no class {wrong!r}: --class takes {', '.join(network.classes)}")
    others = [network.classes.index(other) for other in args.names] or order[1:2]
    numbers = list(dict.fromkeys([order[0], *others]))
    evidence = [gradcam(network.model, x, number) for number in numbers]
    titles = [f"for {network.classes[n]} (probability {probabilities[n]:.1%})" for n in numbers]
    figures.save(draw(picture, evidence, titles, name), args, "gradcam.png")


if __name__ == "__main__":
    main()
