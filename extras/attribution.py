"""The evidence for a class in the pixels of an image, by four methods: Grad-CAM, integrated gradients
(Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365), SmoothGrad (Smilkov et al. 2017,
https://arxiv.org/abs/1706.03825) and occlusion (Zeiler, Fergus 2013, https://arxiv.org/abs/1311.2901).

python -m extras.attribution --image 15 --class cat"""

import numpy as np
import torch

from common import cli, figures, inside
from common.network import from_flags
from common.page.client import save_figure
from extras.gradcam import gradcam

# Each method takes the network, an image `x`, [1, 3, H, W] normalised, and the number of a class, whose logit
# it explains. "Grey" is 0 in `x`, the mean colour of the training images.


def integrated_gradients(model, x, label, steps=25):
    """[3, H, W], of either sign: each pixel times its mean gradient on the straight way from grey to the
    image, by Gauss–Legendre quadrature. They add up to the logit of the image minus that of grey."""
    rule = np.polynomial.legendre.leggauss(steps)
    nodes, weights = (x.new_tensor(values)[:, None, None, None] / 2 for values in rule)
    return x[0] * (weights * inside.class_gradients(model, (nodes + 0.5) * x, label)).sum(0)


def smooth_grad(model, x, label, samples=25):
    """[3, H, W], of either sign: the mean gradient of copies with Gaussian noise of 0.15 of `x`'s range."""
    noise = torch.randn(samples, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x.device)
    return inside.class_gradients(model, x + 0.15 * (x.max() - x.min()) * noise, label).mean(0)


@torch.no_grad()
def occlusion(model, x, label, batch=32):
    """[H, W], of either sign: how much the logit falls when a square is covered with grey, the mean of all
    squares that cover a pixel. At 224 px they are 32 px wide and 16 px apart."""
    side, step = x.shape[-1], max(1, x.shape[-1] // 14)
    starts = torch.arange(0, side - step, step, device=x.device)[:, None]
    covered = (torch.arange(side, device=x.device) - starts).div(2 * step, rounding_mode="floor") == 0  # rows
    masks = (covered[:, None, :, None] & covered[None, :, None, :]).reshape(-1, 1, side, side).to(x)
    logits = torch.cat([model(x * (1 - part))[:, label] for part in masks.split(batch)])
    falls = (model(x)[0, label] - logits)[:, None, None, None]
    return ((falls * masks).sum(0) / masks.sum(0))[0]


METHODS = {  # the evidence, [h, w]: of each pixel, or by Grad-CAM on the coarser grid of conv5_x's maps
    "Grad-CAM": gradcam,
    "integrated gradients": lambda *args: integrated_gradients(*args).sum(0),
    "SmoothGrad": lambda *args: smooth_grad(*args).abs().sum(0),
    "occlusion": occlusion,
}
TEXT = """Bright pixels speak for the class that a row names; what speaks against it is left out, except by
SmoothGrad, which has no sign. Grad-CAM: where the maps of conv5_x respond that raise the class's logit.
Integrated gradients: how much each pixel adds to the logit on the way from a grey image to this one.
SmoothGrad: how sensitive the logit is to the pixel, in the mean of noisy copies. Occlusion: how much the
logit falls when a square there is covered with grey. Each method has its own scale, which a few pixels may
exceed. Which to believe: python -m extras.deletion."""


def draw(network, image, name, x, names=()):
    """A figure: a row for the class that the network says and for each in `names`, a column a method."""
    probabilities = network.model(x)[0].detach().softmax(0)
    labels = inside.choose_classes(probabilities, network.classes, names)
    figure = figures.Figure(figsize=(13, 1.8 + 2.9 * len(labels)), layout="constrained")
    figure.suptitle(f"The evidence for a class in the pixels ({name})")
    axes = figure.subplots(len(labels), 1 + len(METHODS), squeeze=False)
    for row, label in zip(axes, labels):
        figures.show(row[0], image)
        row[0].set_anchor("S")  # as the colorbars do with the others
        row[0].set_ylabel(f"{network.classes[label]}\n(probability {probabilities[label]:.1%})")
    for column, (method, function) in zip(axes.T[1:], METHODS.items()):
        evidence = torch.stack([function(network.model, x, label) for label in labels])
        limit = float(evidence.relu().flatten().quantile(0.995))
        for cell, heat in zip(column, evidence):
            shown = figures.overlay(cell, image, heat, limit)
        column[0].set_title(method)
        label = f"evidence, largest {evidence.max():.2g}"
        figure.colorbar(shown, ax=column, label=label, location="bottom", extend="max", shrink=0.9)
    return figures.explain(figure, TEXT)


@cli.command
def main(argv=None):
    args = cli.parser(__doc__, "network", "data", "image", "class", "out", "port").parse_args(argv)
    save_figure(draw(*from_flags(args), args.names), args, "attribution.png")


if __name__ == "__main__":
    main()
