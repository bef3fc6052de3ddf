"""Looking inside a trained network: opening it, the feature maps of a picture, the map that responds
most, and the pattern that a map responded to."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common import checkpoint, cli, data
from common.cli import UserError
from MyResnet import ResNet18


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


def load_network(path, dataset, device):
    """The network in `path`, or if that is None in runs/<dataset>/weights.pt, on `device`.
    Raises `UserError`."""
    path = Path(path or f"runs/{dataset}/weights.pt")
    if not path.is_file():
        raise UserError(f"no weights in {path}: python train.py makes them, --weights names others")
    saved = checkpoint.load(path)
    try:
        saved = dict(saved)
        model = ResNet18(num_classes=len(saved["classes"]))
        model.load_state_dict(saved["model"])
        network = Network(model.eval(), *(saved[key] for key in Network._fields[1:]))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} was not written by train.py: name a weights.pt of it with --weights")
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} has weights of another network ({detail}): name others with --weights")
    model.to(device, memory_format=cli.memory_format(device))
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


def strengths(maps):
    """How strongly each map responds: [1, channels, h, w] → [channels], the mean activation."""
    return maps[0].detach().mean((1, 2))


def choose_map(maps, number=None):
    """`number` if there is such a map, or without one the map that responds most strongly.
    `maps` is [1, channels, h, w]. Raises `UserError`."""
    if number is None:
        return int(strengths(maps).argmax())
    if number >= maps.shape[1]:
        raise UserError(f"no map {number} in this layer: --map takes 0 to {maps.shape[1] - 1}")
    return number


# How a ReLU passes a gradient back. `ours` is what its derivative makes of it (zero where the ReLU's
# input was negative), `above` is what came from the layer above.
RELU_BACKWARD = {
    "gradient": lambda ours, above: ours,  # Simonyan et al. 2013, https://arxiv.org/abs/1312.6034
    "deconvnet": lambda ours, above: above.relu(),  # Zeiler, Fergus 2013, arxiv.org/abs/1311.2901
    "guided": lambda ours, above: ours.relu(),  # Springenberg et al. 2014, arxiv.org/abs/1412.6806
}


METHOD_NAMES = {
    "gradient": "the gradient",
    "deconvnet": "a deconvnet",
    "guided": "guided backpropagation",
}


def reconstruct(model, x, layer, number, method="guided"):
    """The pattern in the picture that a feature map responded to, by backpropagation.

    The map's own activations go back from `layer` as the gradient, with all other maps at zero, down
    to the pixels; `method`, a key of RELU_BACKWARD, says what a ReLU does with them on the way. `x` is
    [1, 3, H, W], normalised; the pattern is [3, H, W], of either sign. Raises `UserError` if there is
    no such map."""
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
        signal[:, number] = maps[:, number].detach()
        (pattern,) = torch.autograd.grad(maps, x, signal)
    finally:
        for hook in hooks:
            hook.remove()
    return pattern[0]


@torch.no_grad()
def prediction(network, x):
    """What the network takes the picture `x` [1, 3, H, W] for, in words."""
    probabilities = network.model(x)[0].softmax(0)
    best = int(probabilities.argmax())
    return f"the network says {network.classes[best]} ({probabilities[best]:.0%})"
