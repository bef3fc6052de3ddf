"""Looking inside a trained network: opening it, the feature maps of a picture, the map that responds
most, and the pattern that a map responded to."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common import checkpoint, cli, data
from common.cli import UserError
from MyResnet import ResNet18

SIZES = range(32, 1025)  # pixels: of what a network can see
REFERENCE = Path(__file__).parent.parent / "weights" / "resnet18_cifar10.pt"


class Network(NamedTuple):
    """A trained network, with what it needs to know of its pictures."""

    model: ResNet18  # in evaluation mode
    mean: tuple
    std: tuple
    classes: list
    size: int  # pixels: the last that it was trained at

    def prepare(self, images):
        """uint8 [N, 3, S, S] or [3, S, S] → what the model gets, [N, 3, size, size]."""
        images = images.view(-1, *images.shape[-3:]).to(self.model.fc.weight.device)
        return data.prepare(images, self.size, self.mean, self.std)

    def normalise(self, image):
        """float [N, 3, size, size] in 0 … 1 → what the model gets; gradients pass."""
        mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def load_network(path, dataset, device):
    """The network in `path`, on `device`; if that is None, the user's own in runs/<dataset>/weights.pt or,
    without one, the reference network for CIFAR-10. Says which. Raises `UserError`."""
    if path is None:
        path = f"runs/{dataset}/weights.pt"
        if dataset == "cifar10" and not Path(path).exists():
            path = REFERENCE
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights in {path}: python train.py makes them, --weights names others")
    saved = checkpoint.load(path)
    try:
        saved = dict(saved)
        model = ResNet18(num_classes=len(saved["classes"]))
        model.load_state_dict(saved["model"])
        network = Network(model.eval(), *(saved[key] for key in Network._fields[1:]))
        three = len(network.mean) == len(network.std) == 3
        if not (three and min(network.std) > 0 and network.size in SIZES):
            raise ValueError
        numbers = [torch.tensor([*network.mean, *network.std]), *model.state_dict().values()]
        if not all(tensor.isfinite().all() for tensor in numbers):
            raise UserError(f"{path} has weights that are not finite: name others with --weights")
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} was not written by train.py: name a weights.pt of it with --weights")
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} has weights of another network ({detail}): name others with --weights")
    model.to(device, memory_format=cli.memory_format(device))
    print(f"network: {path}, trained on {saved.get('source')}")
    return network


def from_flags(args):
    """What a script's flags name: (the network, the picture as uint8 [3, 32, 32], what it is in words,
    what the model gets of it). Says what the network takes the picture for. Raises `UserError`."""
    network = load_network(args.weights, args.dataset, cli.device(args.device))
    picture, name = data.one_picture(args.image, args.dataset, args.data, network.classes)
    x = network.prepare(picture)
    print(f"{name}; {prediction(network, x)}")
    return network, picture, name, x


def feature_maps(model, x, *layers):
    """The feature maps of the named layers, from one forward pass.

    `x` is [N, 3, H, W], normalised; each layer gives [N, channels, h, w]. They stay in the graph
    where `x` requires a gradient."""
    maps = {}

    def keep(name):
        return lambda module, args, output: maps.update({name: output})

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [maps[name] for name in layers]


def check_layer(model, layer):
    """Raises `UserError` unless `layer` is a stage or a module in one, which has feature maps."""
    names = [name for name, _ in model.named_modules() if name.startswith("conv")]
    if layer not in names:
        stages = ", ".join(name for name in names if "." not in name)
        raise UserError(
            f"no layer {layer!r} with maps: --layer takes {stages}, or a module as conv3_x.block1.conv2"
        )


def strengths(maps):
    """How strongly each map responds: [1, channels, h, w] → [channels], the mean activation."""
    return maps[0].detach().mean((1, 2))


def choose_maps(maps, wanted):
    """The numbers that `wanted` asks for: "7", "7,43", or "strongest:3". Raises `UserError`."""
    kind, _, count = wanted.partition(":")
    if kind == "strongest" and count.isdecimal() and 0 < int(count) <= maps.shape[1]:
        return strengths(maps).argsort(descending=True)[: int(count)].tolist()
    if all(number.isdecimal() and len(number) < 10 for number in wanted.split(",")):
        return [choose_map(maps, int(number)) for number in wanted.split(",")]
    raise UserError(f"no maps {wanted!r}: --map takes a number, several as 7,43, or strongest:K")


def choose_map(maps, number=None):
    """`number` if there is such a map, or without one the map that responds most strongly.
    `maps` is [1, channels, h, w]. Raises `UserError`."""
    if number is None:
        return int(strengths(maps).argmax())
    if number >= maps.shape[1]:
        raise UserError(f"no map {number} in this layer: --map takes 0 to {maps.shape[1] - 1}")
    return number


STAGES = "conv1 conv2_x conv3_x conv4_x conv5_x".split()  # the layers that look at the picture

# How a ReLU passes a gradient back. `ours` is what its derivative makes of it (zero where the ReLU's
# input was negative), `above` is what came from the layer above.
RELU_BACKWARD = {
    "gradient": lambda ours, above: ours,  # Simonyan et al. 2013, https://arxiv.org/abs/1312.6034
    "deconvnet": lambda ours, above: above.relu(),  # Zeiler, Fergus 2013, arxiv.org/abs/1311.2901
    "guided": lambda ours, above: ours.relu(),  # Springenberg et al. 2014, arxiv.org/abs/1412.6806
}
METHOD_NAMES = dict(gradient="the gradient", deconvnet="a deconvnet", guided="guided backpropagation")


def reconstruct(model, x, layer, number, method="guided", unit="map"):
    """The pattern in the picture that a feature map responded to, by backpropagation.

    The map's own activations go back from `layer` as the gradient, with all other maps at zero, down
    to the pixels; `method`, a key of RELU_BACKWARD, says what a ReLU does with them on the way. With
    `unit` "max" instead of "map" only the activation at the map's strongest position does (Zeiler,
    Fergus 2013), with a number only the one at that position of the flattened map. `x` is [1, 3, H, W],
    normalised; the pattern is [3, H, W], of either sign. Raises `UserError` if there is no such map."""
    rule = RELU_BACKWARD[method]
    x = x.detach().requires_grad_()
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    hooks = [
        relu.register_full_backward_hook(lambda module, ours, above: (rule(ours[0], above[0]),))
        for relu in relus
    ]
    try:
        (maps,) = feature_maps(model, x, layer)
        number = choose_map(maps, number)
        signal = torch.zeros_like(maps)
        chosen = maps[0, number].detach().flatten()
        places = slice(None) if unit == "map" else int(chosen.argmax()) if unit == "max" else unit
        signal[0, number].view(-1)[places] = chosen[places]
        (pattern,) = torch.autograd.grad(maps, x, signal)
    finally:
        for hook in hooks:
            hook.remove()
    return pattern[0]


def receptive_field(model, layer):
    """(size, step) in pixels: the side of the square that a position of `layer`'s maps can see, and how far
    apart the squares of neighbours are: position (i, j) sees the one around pixel (step · i, step · j).
    Computed from the kernels and strides on the way: 7 for conv1 up to 435 for conv5_x."""
    modules = list(model.named_modules())
    last = max(i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{layer}."))
    size = step = 1
    for name, module in modules[: last + 1]:
        if "shortcut" not in name and isinstance(module, nn.Conv2d | nn.MaxPool2d):
            kernel, stride = (v if isinstance(v, int) else v[0] for v in (module.kernel_size, module.stride))
            size, step = size + (kernel - 1) * step, step * stride
    return size, step


def smallest_box(pattern, share=0.9):
    """(top, left, bottom, right), the smallest rectangle of pixels with that share of the pattern's energy,
    the squares of its values [3, H, W]; bottom and right are beyond it."""
    energy = np.zeros((pattern.shape[1] + 1, pattern.shape[2] + 1))
    energy[1:, 1:] = pattern.cpu().double().square().sum(0).cumsum(0).cumsum(1)
    needed = share * energy[-1, -1]
    best, box = np.inf, (0, 0, *pattern.shape[1:])
    if not needed:
        return box
    lefts = np.arange(energy.shape[1])
    for top in range(pattern.shape[1]):
        for bottom in range(top + 1, pattern.shape[1] + 1):
            columns = energy[bottom] - energy[top]  # up to each column
            if columns[-1] < needed:
                continue
            rights = np.searchsorted(columns, columns + needed * (1 - 1e-12))
            areas = np.where(rights < len(columns), (rights - lefts) * (bottom - top), np.inf)
            if areas.min() < best:
                best, left = areas.min(), areas.argmin()
                box = top, int(left), bottom, int(rights[left])
    return box


@torch.no_grad()
def prediction(network, x):
    """What the network takes the picture `x` [1, 3, H, W] for, in words."""
    probabilities = network.model(x)[0].softmax(0)
    best = int(probabilities.argmax())
    return f"the network says {network.classes[best]} ({probabilities[best]:.0%})"
