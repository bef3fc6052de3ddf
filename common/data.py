"""The data sets: finding them, and making batches of them on the device.

The way of an image: uint8 [N, 3, 32, 32] on the device → crop, flip → float, normalise → resize to the step's
size → network."""

import collections
import contextlib
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import archive, checkpoint
from common.archive import PACKED, UNPACKED
from common.cli import UserError, one_line, progress_bar
from common.device import memory_format
from common.images import EXTENSIONS, READABLE, SIDE, photograph, read_image

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CLASSES = {"cifar10": CIFAR10_CLASSES, "digits": [str(digit) for digit in range(10)]}  # by label
SPLITS = "train", "test"
ARCHIVE_NAMES = PACKED, PACKED.removesuffix(".gz"), UNPACKED, "data_batch_1", "test_batch"
EXPECTED = f"put train/<class>/ and test/<class>/, {UNPACKED}/, or {PACKED} there"


class Dataset(NamedTuple):
    """Images to train on and to evaluate on, all on one device."""

    train_images: torch.Tensor  # uint8 [N, 3, 32, 32]
    train_labels: torch.Tensor  # int64 [N]
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list  # their names, by label
    source: str  # what was read, in words
    test_split: str = "test"  # or "held-out", if the images to evaluate on are of the training set


def load(name, directory, classes=None, splits=SPLITS):
    """The data set `name`, "cifar10" or "digits", as tensors on the CPU.

    CIFAR-10 comes from `directory`: images as train/<class>/* and test/<class>/*, or the python archive,
    which is downloaded to a folder that is empty or has a part of it. From both the order is the first image
    of each class, then the second of each, and so on, so that any part has all classes. Of CIFAR-10 only
    `splits` are needed and read; the other one has 0 images. Raises `UserError`, also where the data set has
    other classes than `classes`, those of a network."""
    if classes is not None and list(classes) != CLASSES[name]:
        fits = [f"--dataset {other}" for other in CLASSES if list(classes) == CLASSES[other]]
        way_out = fits[0] if fits else "name others with --weights, or the right classes with --classes"
        raise UserError(f"these weights are for other classes than those of {name}: {way_out}")
    if name == "digits":
        return _digits()
    form, root = _locate(Path(directory))
    parts, source = (_image_folders if form == "images" else _archive)(root, splits)
    empty = torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
    return Dataset(*parts.get("train", empty), *parts.get("test", empty), CIFAR10_CLASSES, source)


def _locate(root):
    """(form, path): where CIFAR-10 is, and its form as in `_form`. That is `root` or, where it can only mean
    one thing, the folder above it or one in it. Raises `UserError` if there is something else or nothing."""
    try:
        root.lstat()
        if root.is_file():
            return "archive", root
    except (FileNotFoundError, NotADirectoryError):
        if root != Path("data"):  # data, the default, is made
            raise UserError(f"no folder {root}: name the one that has CIFAR-10 with --data")
        return "nothing", root
    except OSError:
        pass  # _entries says what is wrong with it
    form, here = _form(root), root.resolve()
    if form == "images" and here.name.lower() in SPLITS and not _named(root, SPLITS):
        return form, here.parent
    if form:
        return form, root
    inside = _folders_with(root, "images", "archive")
    if len(inside) == 1:
        return _form(inside[0]), inside[0]
    several = f", or name one of {_listed(inside)} with --data" if inside else ""
    raise UserError(f"no CIFAR-10 in {root}: it has {_listed(_entries(root))}; {EXPECTED}{several}")


def _form(folder):
    """In which form a folder has CIFAR-10: "images"; the python "archive", packed or unpacked; "nothing" if
    it is empty or has a part of a download; None if it has other things. Raises `UserError`."""
    names = {path.name.lower() for path in _entries(folder)}
    if names & {*SPLITS, *CIFAR10_CLASSES}:
        return "images"
    if names & {*ARCHIVE_NAMES}:
        return "archive"
    return "nothing" if all(name.startswith(PACKED) for name in names) else None


def _entries(folder):
    """The paths of what is in a folder, sorted, without hidden files and our own. Raises `UserError`."""
    try:
        names = sorted(name for name in os.listdir(folder) if name[0] != ".")
        return [folder / name for name in names if name not in ("decoded.pt", "__MACOSX")]
    except OSError as error:
        reason = "it is a broken link" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"the folder {folder} cannot be read ({reason}): fix it, or name another with --data")


def _named(folder, names):
    """{name: path} of what has one of these names in a folder, in any letter case. Raises `UserError`."""
    found = {}
    for path in _entries(folder):
        name = path.name.lower()
        if name in names and found.setdefault(name, path) != path:
            raise UserError(f"{folder} has both {found[name].name} and {path.name}: make one folder of them")
    return found


def _folders_with(folder, *forms):
    """The folders in a folder that have CIFAR-10 in one of these forms."""
    found = []
    for path in _entries(folder):
        with contextlib.suppress(UserError):  # it cannot be read
            if path.is_dir() and _form(path) in forms:
                found.append(path)
    return found


def _listed(paths):
    names = [path.name for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"


def _digits():
    """The 8×8 digits of scikit-learn, enlarged to 32×32 RGB; a fifth of each class for testing."""
    from sklearn.datasets import load_digits  # these take seconds to import: only where they are used
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] * (255 / 16), torch.tensor(digits.target)
    images = F.interpolate(images, size=SIDE, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    source = "scikit-learn's handwritten digits"
    return Dataset(images, labels, test_images, test_labels, CLASSES["digits"], source)


def _archive(root, splits):
    """({split: (images, labels)}, the source in words) of the python archive: the file `root`, or in that
    folder, or downloaded to it."""
    places, parts = [root], {}
    if not root.is_file():
        found = _named(root, ARCHIVE_NAMES) if root.exists() else {}
        places = dict.fromkeys(root if "_batch" in name else path for name, path in found.items())
    for split, (images, labels) in zip(splits, archive.load(root, places, splits)):
        rank = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]  # 1 for the first of its class …
        order = (rank * len(CIFAR10_CLASSES) + labels).argsort()
        parts[split] = images[order], labels[order]
    return parts, "CIFAR-10, python archive"


def _image_folders(root, splits):
    """As `_archive`, of folders of images. What they hold is kept in root/decoded.pt, by the name, size and
    time of each file, so that only new files are decoded."""
    folders, left_out = _named(root, SPLITS), collections.Counter()
    if not folders and len(splits) == 1:  # its class folders can only be these
        folders = {splits[0]: root}
    if missing := [f"{split}/" for split in splits if split not in folders]:
        has = f"it has {_listed(_entries(root))}, not train/<class>/ and test/<class>/"
        way_out = " (train.py --holdout N needs none, nor does --image FILE)" if missing == ["test/"] else ""
        raise UserError(f"no {' and no '.join(missing)} in {root}: {has}{way_out}")
    files = {split: _list_images(folders[split], left_out) for split in splits}
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(6))
        print(f"ignored in {root}: {kinds} (only {READABLE} files in the classes' folders are read)")
    cache, broken, changed = _load_cache(root / "decoded.pt"), {}, False
    for split, labels in files.items():
        known, keys = cache.get(split, {}), [_key(path) for path in labels]
        new = [(key, path) for key, path in zip(keys, labels) if key not in known]
        with ThreadPoolExecutor() as pool:
            results = pool.map(_image_or_error, [path for _, path in new])
            results = list(progress_bar(results, f"reading {root}", len(new)))
        for (key, path), result in zip(new, results):
            if isinstance(result, UserError):
                broken[path] = result
            else:
                known[key], changed = result, True
        cache[split] = {key: known[key] for key in keys if key in known}
    if changed:
        _save_cache(cache, root / "decoded.pt")
    if len(broken) == 1:
        raise next(iter(broken.values()))
    if broken:
        names = ", ".join(str(path.relative_to(root)) for path in list(broken)[:10])
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        first = re.split("[,;(]", str(next(iter(broken.values())).__cause__))[0]
        problem = f"{len(broken)} images in {root} cannot be read (the first: {first})"
        raise UserError(f"{problem}: fix, convert or remove {names}{more}")
    parts = {}
    for split, labels in files.items():
        parts[split] = torch.stack(list(cache[split].values())), torch.tensor(list(labels.values()))
    extensions = sorted({path.suffix[1:].lower() for labels in files.values() for path in labels})
    return parts, f"CIFAR-10, {' and '.join(extensions)} files"


def _load_cache(path):
    """{split: {a file's `_key`: image}} as `_save_cache` saved it; {} if there is none, or it is damaged.
    Raises `UserError` if the file has something else."""
    try:
        saved = checkpoint.load(path)
    except (UserError, OSError):
        return {}
    try:
        return {split: dict(zip(part["keys"].splitlines(), part["images"])) for split, part in saved.items()}
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(
            f"{path} is where decoded images are kept, but holds something else: move it elsewhere"
        )


def _save_cache(cache, path):
    content = {}
    for split, images in cache.items():
        if images:
            content[split] = dict(keys="\n".join(images), images=torch.stack(list(images.values())))
    try:
        checkpoint.save(content, path)
    except UserError as error:
        print(f"the decoded images are not kept, and the next start decodes them again: {error}")


def _key(path):
    """A line that identifies a file of a split, as it is now."""
    try:
        stat = path.stat()
        return repr((*path.parts[-2:], stat.st_size, stat.st_mtime_ns))
    except OSError:  # a link to nothing, which read_image reports
        return repr(path.parts[-2:])


def _image_or_error(path):
    try:
        return read_image(path)
    except UserError as error:
        return error


def _list_images(folder, left_out):
    """{path: label} of all images: the first of each class, then the second of each, and so on. What else is
    there is counted in `left_out`."""
    if not _named(folder, CIFAR10_CLASSES) and len(inside := _folders_with(folder, "images")) == 1:
        folder = inside[0]  # a level too deep
    folders, by_class = _named(folder, CIFAR10_CLASSES), []
    others = [path for path in _entries(folder) if path not in folders.values()]
    if missing := [name for name in CIFAR10_CLASSES if name not in folders]:
        has = f", but {_listed(others)}" if others else ""
        raise UserError(
            f"{folder} has no class folder {', '.join(missing)}{has}: each of the ten needs its own"
        )
    for label, name in enumerate(CIFAR10_CLASSES):
        entries = _entries(folders[name])
        images = [path for path in entries if path.suffix.lower() in EXTENSIONS]
        if not images:
            has = f"it has {_listed(entries)}; what is read is {READABLE}"
            raise UserError(f"the class folder {folders[name]} has no images: {has}")
        others += [path for path in entries if path.suffix.lower() not in EXTENSIONS]
        by_class.append([(path, label) for path in images])
    left_out.update("folders" if p.is_dir() else p.suffix.lower() or "without an extension" for p in others)
    return dict(image for row in itertools.zip_longest(*by_class) for image in row if image)


def is_present(name, directory):
    """Whether `load` needs no download. Raises `UserError` where a folder that is not the default one is not
    there, or has something else."""
    try:
        return name == "digits" or _locate(Path(directory))[0] != "nothing"
    except UserError:
        if Path(directory) != Path("data"):
            raise
        return False


def select_image(image, name, directory, classes, crop=None):
    """The image to look at: (uint8 [3, 32, 32], what it is in words). `image` is the number of a test image,
    an image file, or None: the first test image, or, without that data, a photograph that scikit-image ships.
    `classes` are those that the network knows. With `crop`, as in `read_image`, for a network that knows
    photographs, it is [3, crop, crop] and never a test image. Raises `UserError`."""
    if image is not None and not (image.isdecimal() and len(image) < 10):
        return read_image(image, crop), one_line(Path(image).name, 36)
    if crop and image is not None:
        raise UserError(f"no test image {image} for a network of photographs: --image takes an image file")
    if crop:
        return photograph(crop)
    if not is_present(name, directory) and image is None:
        image, what = photograph()
        way_out = "python train.py downloads it, --data names another folder"
        print(f"no CIFAR-10 in {directory} ({way_out}): using a photograph of {what}")
        return image, what
    dataset, index = load(name, directory, classes, ["test"]), int(image or 0)
    if index >= len(dataset.test_images):
        last = len(dataset.test_images) - 1
        raise UserError(f"no test image {index}: --image takes 0 to {last}, or an image file")
    label = dataset.classes[dataset.test_labels[index]]
    return dataset.test_images[index], f"test image {index}: {label}"


class Batch(NamedTuple):
    """Which images a step takes, and how they are augmented: B of them."""

    indices: torch.Tensor  # int64 [B]
    top: torch.Tensor  # int64 [B], pixels: where the crop begins
    left: torch.Tensor
    flip: torch.Tensor  # bool [B]


def epoch_batches(n, batch_size, seed, epoch, shift=0, flip=False, device="cpu"):
    """The batches of an epoch over `n` images, shuffled; a last, smaller one is left out unless it is the
    only one. All is drawn at once from (seed, epoch), so that any step can be done again, on any device.

    A crop is off centre by up to `shift` pixels each way, and half of them are flipped if `flip`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    steps, batch_size = max(1, n // batch_size), min(n, batch_size)
    indices = torch.randperm(n, generator=generator)[: steps * batch_size]
    places = torch.rand(2, len(indices), generator=generator)  # of all possible ones, 0 … 1
    flips = torch.rand(len(indices), generator=generator) < (0.5 if flip else 0)
    top, left = (places * (2 * shift + 1)).long() - shift
    parts = (part.to(device).split(batch_size) for part in (indices, top, left, flips))
    return [Batch(*batch) for batch in zip(*parts)]


def augment(images, batch):
    """The images of a batch, cropped (beyond its edge an image is its own reflection) and flipped:
    uint8 [N, 3, 32, 32] → [B, 3, 32, 32], channels last."""

    def reflect(index):  # … 2 1 | 0 1 2 … 31 | 30 29 …
        return (SIDE - 1) - ((SIDE - 1) - index.abs()).abs()

    index = torch.arange(SIDE, device=images.device)
    rows = reflect(index + batch.top[:, None])
    columns = reflect(torch.where(batch.flip[:, None], index.flip(0), index) + batch.left[:, None])
    crops = images[batch.indices[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)  # the indexing put the channels last


def normalize_and_resize(images, size, mean, std):
    """uint8 [N, 3, S, S] → float32 [N, 3, size, size]: (value / 255 - mean) / std per channel, bilinear."""
    x = images.float().contiguous(memory_format=memory_format(images.device))
    for channel in range(3):  # by plain numbers: a tensor of them would make a GPU wait for its copy
        x[:, channel] = (x[:, channel] - 255 * mean[channel]) / (255 * std[channel])
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
