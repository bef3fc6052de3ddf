"""Opening a trained network, and what it predicts for an image."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from common import checkpoint, data
from common.cli import UserError
from common.device import memory_format, select_device
from MyResnet import ResNet18

REFERENCE = Path(__file__).parent.parent / "weights" / "resnet18_cifar10.pt"


class Network(NamedTuple):
    """A trained network, with what it needs to know of its images."""

    model: ResNet18  # in evaluation mode
    mean: tuple
    std: tuple
    classes: list
    size: int  # pixels: the last that it was trained at

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
        """What the network takes the image `x`, [1, 3, H, W], for, in words."""
        confidence, predicted = self.model(x)[0].softmax(0).max(0)
        return f"the network says {self.classes[predicted]} ({confidence:.0%})"


def without_prefixes(state_dict):
    """The state dict without what DataParallel and torch.compile put into its names: module., _orig_mod."""
    return {re.sub(r"\b(module|_orig_mod)\.", "", name): tensor for name, tensor in state_dict.items()}


def load_network(path, dataset, device):
    """The network in `path`, on `device`; if that is None, the user's own in runs/<dataset>/weights.pt or,
    without one, the reference network for CIFAR-10. Says which. Raises `UserError`."""
    own = Path(f"runs/{dataset}/weights.pt")
    path = Path(path or (REFERENCE if dataset == "cifar10" and not own.exists() else own))
    if not path.is_file():
        raise UserError(f"no weights in {path}: python train.py makes them, --weights names others")
    saved = checkpoint.load(path)
    try:
        saved = dict(saved)
        model = ResNet18(num_classes=len(saved["classes"]))
        model.load_state_dict(without_prefixes(saved["model"]))
        network = Network(model.eval(), *(saved[key] for key in Network._fields[1:]))
        named = all(isinstance(name, str) for name in network.classes)
        three = len(network.mean) == len(network.std) == 3
        if not (named and three and min(network.std) > 0 and network.size in range(32, 1025)):
            raise ValueError
        numbers = [torch.tensor([*network.mean, *network.std]), *model.state_dict().values()]
        if not all(tensor.isfinite().all() for tensor in numbers):
            raise UserError(f"{path} has weights that are not finite: name others with --weights")
    except UserError:
        raise
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} has weights of another network ({detail}): name others with --weights")
    except Exception:  # anybody may have written it, and anything may be in it
        raise UserError(f"{path} was not written by train.py: name a weights.pt of it with --weights")
    model.to(device, memory_format=memory_format(device))
    print(f"network: {path}, trained on {saved.get('source')}")
    return network


def from_flags(args):
    """What a script's flags name: (the network, the image as uint8 [3, 32, 32], what it is in words, what the
    model gets of it). Says what the network takes the image for. Raises `UserError`."""
    network = load_network(args.weights, args.dataset, select_device(args.device))
    image, name = data.select_image(args.image, args.dataset, args.data, network.classes)
    x = network.preprocess(image)
    print(f"{name}; {network.prediction(x)}")
    return network, image, name, x
