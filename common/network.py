"""Opening a trained network, whoever trained it, and what it predicts for an image."""

import math
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from common import data, weights
from common.cli import UserError
from common.device import memory_format, select_device
from MyResnet import ResNet18

REFERENCE = Path(__file__).parent.parent / "weights" / "resnet18_cifar10.pt"
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224)  # torchvision's


class Network(NamedTuple):
    """A trained network, with what it needs to know of its images."""

    model: ResNet18  # in evaluation mode
    mean: tuple
    std: tuple
    classes: list
    size: int  # pixels: the last that it was trained at
    photographs: bool = False  # whether it sees them in full, as ImageNet's; else they are shrunk to 32×32

    @property
    def crop(self):
        """The side of the square that it sees of a photograph, or None for what was shrunk to 32×32."""
        return self.size if self.photographs else None

    def preprocess(self, images):
        """uint8 [N, 3, S, S] or [3, S, S] → what the model gets, [N, 3, size, size]."""
        images = images.view(-1, *images.shape[-3:]).to(self.model.fc.weight.device)
        return data.normalize_and_resize(images, self.size, self.mean, self.std)

    def normalize(self, image):
        """float [N, 3, size, size] in 0 … 1 → what the model gets; gradients pass."""
        mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std

    @torch.no_grad()
    def prediction(self, x):
        """What the network takes the image `x`, [1, 3, H, W], for, in words. Raises `UserError`."""
        confidence, predicted = self.model(x)[0].softmax(0).max(0)
        if not confidence.isfinite():
            raise UserError("the network's logits are not finite: name other weights with --weights")
        return f"the network says {self.classes[predicted]} ({confidence:.0%})"


def weights_path(path, dataset):
    """The file that --weights names, or without it the user's own run or else the reference network. Raises
    `UserError` if that is only for another data set."""
    own = Path(f"runs/{dataset}/weights.pt")
    if path or own.exists():
        return path or own
    if dataset != "cifar10":
        way_out = f"python train.py --dataset {dataset} makes them, --weights names others"
        raise UserError(f"no weights in {own}: {way_out}")
    return REFERENCE


def load_network(path, dataset, device, **given):
    """The network in `path`, or in `weights_path`, on `device`. Its `mean`, `std`, `size` and `classes` (the
    path of a file with a name a line) are those `given`, those in its file, or ImageNet's if it was not
    written by train.py. Says what was opened. Raises `UserError`."""
    path = weights_path(path, dataset)
    state, saved = weights.read(path)
    count = len(state["fc.weight"])
    keys = "mean", "std", "size", "classes"
    known = saved.keys() >= set(keys)  # train.py's have them all
    about = {key: saved.get(key) for key in keys} if known else IMAGENET | dict(classes=_class_names(count))
    about |= {key: value for key, value in given.items() if value is not None}
    if given.get("classes"):
        about["classes"] = _read_names(given["classes"])
    try:
        named = all(isinstance(name, str) for name in about["classes"])
        numbers = *about["mean"], *about["std"]
        if not (named and len(numbers) == 6 and all(map(math.isfinite, numbers)) and min(about["std"]) > 0):
            raise ValueError
        if len(about["mean"]) != 3 or about["size"] not in range(32, 1025):
            raise ValueError
    except (TypeError, ValueError, RuntimeError):  # anybody may have written it, and anything may be in it
        raise UserError(f"{path} was not written by train.py: name a weights.pt of it with --weights")
    if len(about["classes"]) != count:
        names = f"there are {len(about['classes'])} names of classes"
        raise UserError(f"{path} knows {count} classes, {names}: --classes takes a file with a name a line")
    model = ResNet18(count)
    model.load_state_dict(state)
    model.eval().to(device, memory_format=memory_format(device))
    accuracy = saved.get("accuracy", math.nan)
    ending = ", saved in its first epoch" if accuracy is None else ""
    if isinstance(accuracy, float) and math.isfinite(accuracy):
        ending = f", accuracy {accuracy:.2%}"
    trained = f"trained on {saved.get('source')}{ending}" if known else (
        f"{count} classes; assuming that it sees photographs, {about['size']} px, mean {about['mean']}, "
        f"std {about['std']}: --mean, --std and --size change that")  # fmt: skip
    print(f"network: {path}, {trained}")
    return Network(model, **about, photographs=not known)


def _class_names(count):
    if count == 1000:  # torchvision has ImageNet's, but needs a second and 170 MB to be imported as a whole
        folder = Path(find_spec("torchvision").origin).parent
        return runpy.run_path(folder / "models/_meta.py")["_IMAGENET_CATEGORIES"]
    return [f"class {number}" for number in range(count)]


def _read_names(path):
    """The lines of a text file. Raises `UserError`."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): --classes takes a file with a name a line")


def network_from_flags(args):
    """The network that a script's flags name. Raises `UserError`."""
    given = {key: getattr(args, key, None) for key in ("mean", "std", "size", "classes")}
    return load_network(args.weights, args.dataset, select_device(args.device), **given)


def from_flags(args):
    """What a script's flags name: (the network, the image as uint8 [3, S, S], what it is in words, what the
    model gets of it). Says what the network takes the image for. Raises `UserError`."""
    network = network_from_flags(args)
    image, name = data.select_image(args.image, args.dataset, args.data, network.classes, network.crop)
    x = network.preprocess(image)
    print(f"{name}; {network.prediction(x)}")
    return network, image, name, x
