"""Looking inside a trained network: the feature maps of an image, the map that responds most, the pattern
that a map responded to, and where in the image it was."""

import numpy as np
import torch
from torch import nn

from common.cli import UserError

STAGES = "conv1 conv2_x conv3_x conv4_x conv5_x".split()  # the layers that have feature maps


def feature_maps(model, x, *layers):
    """The feature maps of the named layers, from one forward pass.

    `x` is [N, 3, H, W], normalised; each layer gives [N, channels, h, w]. They stay in the graph where `x`
    requires a gradient."""
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
        way_out = f"--layer takes {stages}, or a module as conv3_x.block1.conv2"
        raise UserError(f"no layer {layer!r} with maps: {way_out}")


def mean_activations(maps):
    """How strongly each map responds: [1, channels, h, w] → [channels]."""
    return maps[0].detach().mean((1, 2))


def choose_maps(maps, selection):
    """The channels of `maps`, [1, channels, h, w], that --map selects: "7", "7,43", or "strongest:3", the
    three with the highest mean activation. Raises `UserError`."""
    kind, _, count = selection.partition(":")
    if kind == "strongest" and count.isdecimal() and 0 < int(count) <= maps.shape[1]:
        return mean_activations(maps).argsort(descending=True)[: int(count)].tolist()
    if not all(number.isdecimal() and len(number) < 10 for number in selection.split(",")):
        raise UserError(f"no maps {selection!r}: --map takes a number, several as 7,43, or strongest:K")
    return [check_channel(maps, int(number)) for number in selection.split(",")]


def check_channel(maps, channel):
    """`channel`, if `maps`, [1, channels, h, w], have it. Raises `UserError`."""
    if channel >= maps.shape[1]:
        raise UserError(f"no map {channel} in this layer: --map takes 0 to {maps.shape[1] - 1}")
    return channel


def describe_map(maps, layer, channel):
    """A map of `maps`, [1, channels, h, w], in words: which it is, and how strongly it responds."""
    if not maps[0, channel].any():
        return f"map {channel} of {layer} is silent on this image"
    return f"map {channel} of {layer}, mean activation {mean_activations(maps)[channel]:.3f}"


# How a ReLU passes a gradient back. `grad_output` comes from the layer above; `grad_input` is what the ReLU's
# derivative makes of it: zero where the ReLU's input was negative.
RELU_BACKWARD = {
    # Simonyan et al. 2013, https://arxiv.org/abs/1312.6034
    "gradient": lambda grad_input, grad_output: grad_input,
    # Zeiler, Fergus 2013, https://arxiv.org/abs/1311.2901
    "deconvnet": lambda grad_input, grad_output: grad_output.relu(),
    # Springenberg et al. 2014, https://arxiv.org/abs/1412.6806
    "guided": lambda grad_input, grad_output: grad_input.relu(),
}
METHOD_NAMES = dict(gradient="the gradient", deconvnet="a deconvnet", guided="guided backpropagation")


def reconstruct(model, x, layer, channel, method="guided", unit="map"):
    """The pattern in the image that a feature map responded to, by backpropagation.

    The map's own activations go back from `layer` as the gradient, with all other maps at zero, down to the
    pixels; `method`, a key of RELU_BACKWARD, says what a ReLU does with them on the way. With `unit` "max"
    instead of "map" only the activation at the map's strongest position does (Zeiler, Fergus 2013), with a
    number only the one at that position of the flattened map. `x` is [1, 3, H, W], normalised; the pattern is
    [3, H, W], of either sign. Raises `UserError` if there is no such map."""

    def backward_hook(relu, grad_input, grad_output):
        return (RELU_BACKWARD[method](grad_input[0], grad_output[0]),)

    x = x.detach().requires_grad_()
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    hooks = [relu.register_full_backward_hook(backward_hook) for relu in relus]
    try:
        (maps,) = feature_maps(model, x, layer)
        activations = maps[0, check_channel(maps, channel)].detach().flatten()
        places = slice(None) if unit == "map" else int(activations.argmax()) if unit == "max" else unit
        signal = torch.zeros_like(maps)
        signal[0, channel].view(-1)[places] = activations[places]
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
