"""Reading the weights of a ResNet-18 from whatever they come in: a weights.pt or last.pt of train.py, a state
dict of torchvision's or of this network, alone or within a checkpoint, or a .safetensors file."""

import http.client
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from common import checkpoint
from common.cli import UserError
from MyResnet import ResNet18, to_torchvision


def read(path, flag="--weights"):
    """(state dict of a `ResNet18`, float32 on the CPU; what else the file holds, a dictionary). Raises
    `UserError` if there is no file, or no ResNet-18 with finite weights in it; that names `flag` as the way
    to another file."""
    content = _content(path, flag)
    found = _state_dict(content)
    if found is None:
        raise UserError(f"{path} has no state dict of a network: name others with {flag}")
    found = {re.sub(r"\b(module|_orig_mod)\.", "", name): tensor for name, tensor in found.items()}
    prefix = next((name.removesuffix("fc.weight") for name in found if name.endswith("fc.weight")), "")
    found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    classes = max(1, found["fc.bias"].numel()) if "fc.bias" in found else 10
    expected = {name: tensor.shape for name, tensor in ResNet18(1).state_dict().items()}
    expected |= {name: (classes, *expected[name][1:]) for name in ("fc.weight", "fc.bias")}
    theirs = "conv1.conv.weight" not in found  # torchvision's names
    names = dict(zip(to_torchvision(expected) if theirs else expected, expected))
    if difference := _difference(found, names, expected):
        raise UserError(f"{path} has weights of another network ({difference}): name others with {flag}")
    counts = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    try:
        state = counts | {ours: found[name].float() for name, ours in names.items() if name in found}
        finite = all(tensor.isfinite().all() for tensor in state.values())
    except RuntimeError:  # there are tensors without values, sparse and quantised ones
        finite = False
    if not finite:
        raise UserError(f"{path} has weights that are not finite: name others with {flag}")
    return state, content if isinstance(content, dict) else {}


def _content(path, flag):
    """What the file holds. `path` may also be "imagenet"."""
    if str(path) == "imagenet":
        from torchvision.models import ResNet18_Weights  # takes a second to import

        weights = ResNet18_Weights.IMAGENET1K_V1
        try:
            return weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            way_out = f"get {weights.url} elsewhere, and name the file with {flag}"
            raise UserError(f"ImageNet's weights cannot be downloaded ({error}): {way_out}")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: {flag} takes a file, such as {Path(path) / 'weights.pt'}")
    if not Path(path).is_file():
        raise UserError(f"no weights in {path}: python train.py makes them, {flag} names others")
    if Path(path).suffix.lower() != ".safetensors":
        return checkpoint.load(path)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs a library that is not installed: pip install safetensors")
    try:
        return load_file(path)
    except Exception as error:  # it has kinds of its own
        raise UserError(f"{path} is not a .safetensors file, or is damaged ({type(error).__name__})")


def _state_dict(content, depth=3):
    """The first dictionary of many tensors by name in `content` or in the dictionaries in that, or None."""
    if not isinstance(content, Mapping) or not depth:
        return None
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if len(tensors) > 20 or "fc.weight" in tensors:
        return tensors
    found = (_state_dict(value, depth - 1) for value in content.values())
    return next((tensors for tensors in found if tensors is not None), None)


def _difference(found, names, expected):
    """How the tensors `found`, whose `names` map to ours, differ from the shapes `expected`; "" if they are
    those of a ResNet-18."""

    def words(shape):
        return "×".join(map(str, shape)) or "a number"

    for name, ours in names.items():
        if name not in found and not name.endswith("num_batches_tracked"):
            return f"it has no {name}"
        if name in found and found[name].shape != expected[ours]:
            return f"{name} is {words(found[name].shape)}, not {words(expected[ours])}"
    return next((f"it also has {name}" for name in found if name not in names), "")
