"""Looking inside a trained network: the feature maps of an image, what they responded to, and where."""

from contextlib import ExitStack
from itertools import combinations

import numpy as np
import torch
from torch import nn

from common.cli import UserError
from common.device import memory_format
from MyResnet import ResNet18

STAGES = "conv1 conv2_x conv3_x conv4_x conv5_x".split()  # the layers that have feature maps


def feature_maps(model, x, *layers):
    """The feature maps [N, channels, h, w] of each of the named layers, from one forward pass of `x`,
    [N, 3, H, W], normalised; of "fc" the logits [N, classes]. They stay in the graph where `x` requires a
    gradient."""
    modules, maps = [model.get_submodule(name) for name in layers], {}

    def forward_hook(module, args, output):
        maps[module] = output

    with ExitStack() as hooks:  # all are removed at its end, also after an error
        for module in modules:
            hooks.enter_context(module.register_forward_hook(forward_hook))
        model(x)
    return [maps[module] for module in modules]


def check_layer(model, layer):
    """Raises `UserError` unless `layer` is a stage or a module in one, which has feature maps."""
    if layer not in [name for name, _ in model.named_modules() if name.startswith("conv")]:
        way_out = f"--layer takes {', '.join(STAGES)}, or a module as conv3_x.block1.conv2"
        raise UserError(f"no layer {layer!r} with maps: {way_out}")


def mean_activations(maps):
    """How strongly each map responds: [1, channels, h, w] → [channels]."""
    return maps[0].detach().mean((1, 2))


def contributions(model, means):
    """What each map of conv5_x adds to each class's logit, [classes, maps], from the maps' mean activations
    [maps]. Only average pooling and fc come after it, so these and fc's bias add up to the logit exactly."""
    return model.fc.weight.detach() * means


def logits(model, means):
    """The logits of images, [N, classes] on the CPU, from the mean activations of conv5_x [maps, N] there."""
    return nn.functional.linear(means.T, model.fc.weight.detach().cpu(), model.fc.bias.detach().cpu())


@torch.inference_mode()
def silent_shares(model, x):
    """The share of the maps of each stage, {stage: 0 … 1}, that respond to none of the images `x`,
    [N, 3, H, W] normalised."""
    maps = feature_maps(model, x, *STAGES)
    return {stage: float((m.amax((0, 2, 3)) <= 0).float().mean()) for stage, m in zip(STAGES, maps)}


def class_gradients(model, x, label):
    """The gradients [N, 3, H, W] of the logit of class `label`, for each of the images `x`, by their
    pixels."""
    parts = [part.detach().requires_grad_() for part in x.split(16)]
    return torch.cat([torch.autograd.grad(model(part)[:, label].sum(), part)[0] for part in parts])


def mistakes(labels, logits, classes):
    """[(number of an image, its class, the class that the network says, its confidence 0 … 1)] of the images
    taken for another class, the most confident first, from labels [N] and logits [N, classes]."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    numbers = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    names = ([classes[n] for n in found[numbers]] for found in (labels, predicted))
    return list(zip(numbers.tolist(), *names, confidence[numbers].tolist()))


def choose_classes(probabilities, classes, names):
    """The numbers of the most probable class and of the classes in `names` (--class), or else of the second
    most probable, from probabilities [classes]. Raises `UserError`."""
    if unknown := set(names) - set(classes):
        raise UserError(f"no class {unknown.pop()!r}: --class takes {', '.join(classes)}")
    order = probabilities.argsort(descending=True).tolist()
    return list(dict.fromkeys([order[0], *([classes.index(name) for name in names] or order[1:2])]))


def choose_maps(maps, selection, one_image=True):
    """Channels of `maps`, [1, channels, h, w], for --map "7", "7,43" or, where a script looks at
    `one_image`, "strongest:3". Raises `UserError`."""
    kind, _, count = selection.partition(":")
    if kind == "strongest" and not one_image:
        raise UserError("--map takes a number here, or several as 7,43")
    if kind == "strongest" and count.isdecimal() and len(count) < 10 and 0 < int(count) <= maps.shape[1]:
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
        return f"map {channel} of {layer} is silent on this image: choose another map"
    return f"map {channel} of {layer}, mean activation {mean_activations(maps)[channel]:.3f}"


# How a ReLU passes a gradient back. `grad_output` comes from the layer above; `grad_input` is what the ReLU's
# derivative makes of it: zero where the ReLU's input was negative.
RELU_BACKWARD = {
    "gradient": lambda grad_input, grad_output: grad_input,  # Simonyan et al. 2013, arXiv:1312.6034
    "deconvnet": lambda grad_input, grad_output: grad_output.relu(),  # Zeiler, Fergus 2013, arXiv:1311.2901
    "guided": lambda grad_input, grad_output: grad_input.relu(),  # Springenberg et al. 2014, arXiv:1412.6806
}
METHOD_NAMES = dict(gradient="the gradient", deconvnet="a deconvnet", guided="guided backpropagation")


def reconstruct(model, x, layer, channel, method="guided", unit="map"):
    """The pattern [3, H, W], of either sign, that a feature map of `layer` responded to in the image `x`,
    [1, 3, H, W] normalised: its own activations, with zero for all other maps, are backpropagated to the
    pixels. `method`, a key of RELU_BACKWARD, says what a ReLU does with them. `unit` is "map" for the whole
    map, "max" for its strongest position alone (Zeiler, Fergus 2013), or a position in the flattened map.
    Raises `UserError` if there is no such map."""

    def backward_hook(relu, grad_input, grad_output):
        return (RELU_BACKWARD[method](grad_input[0], grad_output[0]),)

    x = x.detach().requires_grad_()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                hooks.enter_context(module.register_full_backward_hook(backward_hook))
        (maps,) = feature_maps(model, x, layer)
        activations = maps[0, check_channel(maps, channel)].detach().flatten()
        places = slice(None) if unit == "map" else int(activations.argmax()) if unit == "max" else unit
        signal = torch.zeros_like(maps)
        signal[0, channel].view(-1)[places] = activations[places]
        (pattern,) = torch.autograd.grad(maps, x, signal)
    return pattern[0]


def randomize(model, stages, seed=0):
    """The network with those stages as before training; it shares the others with `model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = ResNet18(model.fc.out_features)
    trained = {name: t for name, t in model.state_dict().items() if name.partition(".")[0] not in stages}
    new.load_state_dict(trained, strict=False, assign=True)
    weight = model.fc.weight
    return new.eval().to(weight.device, weight.dtype, memory_format=memory_format(weight.device))


def rank_correlation(pattern, other):
    """Spearman's, of the magnitudes of two patterns [3, H, W], summed over the colours, where one of them is
    not 0: 1 for the same, and 0 if one of them is empty, or the same everywhere."""

    def ranks(values):  # equal values share the mean of their ranks
        _, groups, sizes = values.unique(return_inverse=True, return_counts=True)
        return (sizes.cumsum(0) - (sizes.double() - 1) / 2)[groups]

    a, b = (p.detach().abs().sum(0).cpu() for p in (pattern, other))
    seen = (a > 0) | (b > 0)
    if len(a[seen].unique()) < 2 or len(b[seen].unique()) < 2:  # there is nothing to rank
        return 0.0
    return float(torch.corrcoef(torch.stack([ranks(a[seen]), ranks(b[seen])]))[0, 1])


def control(model, x, pattern, layer, channel, method="guided", unit="map"):
    """What tells whether `pattern`, which `reconstruct` gave for these arguments, comes from what the network
    has learned: (the same pattern [3, H, W] from a copy in which the layer's stage and the one below it are
    random, their rank correlation). That of a single position is within the pattern's `smallest_box`: beyond
    it, both fade towards the edge of what the position sees, whatever the image shows. After Adebayo et al.
    2018, https://arxiv.org/abs/1810.03292."""
    if unit == "max":  # the position that is the strongest in the trained network
        (maps,) = feature_maps(model, x, layer)
        unit = int(maps[0, channel].argmax())
    for seed in range(10):  # until the map responds
        random = reconstruct(randomize(model, random_stages(layer), seed), x, layer, channel, method, unit)
        if random.any():
            break
    if unit == "map":
        return random, rank_correlation(pattern, random)
    top, left, bottom, right = smallest_box(pattern)
    return random, rank_correlation(pattern[:, top:bottom, left:right], random[:, top:bottom, left:right])


def random_stages(layer):
    """The stages that `control` makes random: that of the layer, and the one below it."""
    number = STAGES.index(layer.partition(".")[0])
    return STAGES[max(0, number - 1) : number + 1]


def describe_control(layer, correlation):
    """What `control` found, in words."""
    stages = " and ".join(random_stages(layer))
    verdict = ""
    if correlation > 0.6:
        verdict = " So the pattern mostly shows edges and areas of the image itself."
    return f"Control, with random weights in {stages}: rank correlation {correlation:.2f}.{verdict}"


def receptive_field(model, layer):
    """(size, step) in pixels, from the kernels and strides: position (i, j) of `layer`'s maps sees the square
    of that size around pixel (step · i, step · j). It is (7, 2) for conv1 and (435, 32) for conv5_x."""
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
    height, width = pattern.shape[1:]
    squares = pattern.cpu().double().square().sum(0)
    energy = np.pad(squares.cumsum(0).cumsum(1), (1, 0))  # of all pixels above and to the left of each
    needed = share * energy[-1, -1]
    smallest, box = np.inf, (0, 0, height, width)
    for top, bottom in combinations(range(height + 1), 2):
        columns = energy[bottom] - energy[top]  # between these rows, left of each column
        if not 0 < needed <= columns[-1]:
            continue
        rights = np.searchsorted(columns, columns + needed * (1 - 1e-12))  # for each left column
        areas = np.where(rights <= width, (rights - np.arange(width + 1)) * (bottom - top), np.inf)
        if areas.min() < smallest:
            smallest, left = areas.min(), int(areas.argmin())
            box = top, left, bottom, int(rights[left])
    return box
