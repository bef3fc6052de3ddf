"""What every feature map responds to over many images: how strongly to each, and to which nine most, where.
After Zeiler, Fergus 2013, https://arxiv.org/abs/1311.2901, figure 2."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common import checkpoint, cli, inside
from common.device import autocast, select_precision
from common.images import Photographs

CACHE = Path("runs/responses")


def bar(parts):
    """The parts, with a progress bar."""
    return cli.progress_bar(parts, "looking at every image")


@torch.inference_mode()
def strongest(network, images, batch=25, progress=bar, precision="auto"):
    """For each stage: (values [maps, 9], images [maps, 9], positions [maps, 9] in the flattened map, the
    strongest first; mean activations [maps, N]) over all `images`, uint8 [N, 3, S, S] or `Photographs`.
    `progress` gets the batches and yields each again; `precision` is one that `select_precision` takes."""
    nine, means = {}, {}
    device = network.model.fc.weight.device
    precision = select_precision(precision, device)
    for part, start in zip(progress(DataLoader(images, batch)), range(0, len(images), batch)):
        with autocast(device, precision):
            stages = inside.feature_maps(network.model, network.preprocess(part), *inside.STAGES)
        for stage, maps in zip(inside.STAGES, stages):
            peaks, positions = F.adaptive_max_pool2d(maps, 1, return_indices=True)
            peaks, positions = peaks.float().flatten(1).T.cpu(), positions.flatten(1).T.cpu()
            indices = torch.arange(start, start + len(part)).expand_as(positions)
            new = peaks, indices, positions  # [maps, B] each, put beside the nine until then
            candidates = [torch.cat(pair, 1) for pair in zip(nine[stage], new)] if stage in nine else new
            order = candidates[0].argsort(descending=True, stable=True)[:, :9]  # of equals the first image
            nine[stage] = [tensor.gather(1, order) for tensor in candidates]
            if not start:  # room for all at once: many small tensors between large ones would fill the memory
                means[stage] = torch.empty(maps.shape[1], len(images))
            means[stage][:, indices[0]] = maps.mean((2, 3), dtype=torch.float32).T.cpu()
    return {stage: (*nine[stage], means[stage]) for stage in inside.STAGES}


def cached_strongest(network, images, **options):
    """`strongest`, from the disk if it was computed before for this network and these images."""
    preprocessing = torch.tensor([network.size, *network.mean, *network.std])
    tensors, digest = [*network.model.state_dict().values(), preprocessing], hashlib.sha256()
    if isinstance(images, Photographs):
        stats = ((path, path.stat()) for path in images.paths)
        listing = [(path.resolve().as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        digest.update(repr(listing).encode(errors="surrogateescape"))
    else:
        tensors.append(images)
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    name = digest.hexdigest()
    return checkpoint.cached(CACHE / f"{name[:16]}.pt", lambda: strongest(network, images, **options))


def crop_box(position, width, field, step, size):
    """(top, left, bottom, right): what a position of a map of that width sees of a size×size image."""
    row, column = (step * index for index in divmod(position, width))
    half = field // 2
    return max(0, row - half), max(0, column - half), min(size, row + half + 1), min(size, column + half + 1)


def crops(network, layer, width, images, positions):
    """What the `positions` [N] in maps of that width see of `images`, uint8 [N, 3, S, S], enlarged to the
    network's size: for each (float [3, h, w] in 0 … 1, its place there as (top, left, bottom, right))."""
    field, step = inside.receptive_field(network.model, layer)
    found = []
    for image, position in zip(images, positions):
        box = top, left, bottom, right = crop_box(int(position), width, field, step, network.size)
        large = F.interpolate(image[None] / 255, network.size, mode="bilinear")[0]
        found.append((large[:, top:bottom, left:right], box))
    return found
