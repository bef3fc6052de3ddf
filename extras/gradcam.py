"""The evidence for a class in an image: Grad-CAM over conv5_x or any other stage (Selvaraju et al. 2016,
https://arxiv.org/abs/1610.02391), for what the network says and for any other class.

python -m extras.gradcam --image 15 --class cat --class horse"""

import torch

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure


def gradcam(model, x, label, layer="conv5_x"):
    """Where in the image `x`, [1, 3, H, W] normalised, the evidence for class `label` is: [h, w], the maps of
    `layer`, each weighted by the mean gradient of the class's logit, and of their sum what is positive."""
    maps, logits = inside.feature_maps(model, x, layer, "fc")
    (gradient,) = torch.autograd.grad(logits[0, label], maps)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1)[0].relu().detach()


def draw(network, image, name, x, names=(), layer="conv5_x"):
    """A figure of the evidence for the class that the network says and for those in `names`, on one scale."""
    probabilities = network.model(x)[0].detach().softmax(0)
    labels = inside.choose_classes(probabilities, network.classes, names)
    captions = [f"for {network.classes[n]} (probability {probabilities[n]:.1%})" for n in labels]
    evidence = torch.stack([gradcam(network.model, x, label, layer) for label in labels])
    title = f"Where the evidence for a class is in the image, by Grad-CAM over {layer}"
    figure = figures.side_by_side([image] * (1 + len(labels)), [name, *captions], title)
    for axes, heat in zip(figure.axes[1:], evidence):
        shown = figures.overlay(axes, image, heat, float(evidence.max()))
    figure.colorbar(shown, ax=figure.axes[-1], label="evidence (one scale)", shrink=0.7)
    text = f"""Bright areas are where maps of {layer} that raise this class's logit outweigh those that lower
    it; where they do not, nothing is drawn. The positions are as coarse as these maps."""
    return figures.explain(figure, text)


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "class", "layer", "out", "port").parse_args(argv)
    end = "" if args.layer == "conv5_x" else f"_{args.layer}"
    save_figure(draw(*from_flags(args), args.names, args.layer), args, f"gradcam{end}.png")


if __name__ == "__main__":
    main()
