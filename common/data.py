"""The images: finding them, reading them, and making batches of them on the device.

The way of an image: uint8 [N, 3, 32, 32] on the device → crop, flip → float, normalise → resize to the step's
size → network."""

import hashlib
import itertools
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common import checkpoint
from common.cli import UserError
from common.device import memory_format

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CLASSES = {"cifar10": CIFAR10_CLASSES, "digits": [str(digit) for digit in range(10)]}  # by label
SIDE = 32  # pixels: what an image is before it is resized for the network
FORMATS = "PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"  # not those for which PIL starts programs
EXTENSIONS = ".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"
ARCHIVE, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"


class Dataset(NamedTuple):
    """Images to train on and to evaluate on, all on one device."""

    train_images: torch.Tensor  # uint8 [N, 3, 32, 32]
    train_labels: torch.Tensor  # int64 [N]
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list  # their names, by label
    source: str  # what was read, in words
    test_split: str = "test"  # or "held-out", if the images to evaluate on are of the training set


def load(name, directory, classes=None):
    """The data set `name`, "cifar10" or "digits", as tensors on the CPU.

    CIFAR-10 comes from `directory`: images as train/<class>/* and test/<class>/*, or the python archive,
    which is downloaded when neither is there. From both the order is the first image of each class, then the
    second of each, and so on, so that any part has all classes. Raises `UserError`, also where the data set
    has other classes than `classes`, those of a network."""
    if classes is not None and list(classes) != CLASSES[name]:
        fits = [f"--dataset {other}" for other in CLASSES if list(classes) == CLASSES[other]]
        way_out = fits[0] if fits else "name others with --weights"
        raise UserError(f"these weights are for other classes than those of {name}: {way_out}")
    if name == "digits":
        return _digits()
    root = Path(directory)
    is_present(name, root)  # or an error
    if (root / "train").is_dir() or (root / "test").is_dir():
        return _image_folders(root)
    return _archive(root)


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


def _archive(root):
    """CIFAR-10's python archive, downloaded and unpacked if need be."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url

    archive, names = root / ARCHIVE, [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    if archive.exists() and not check_integrity(archive, CIFAR10.tgz_md5):
        raise UserError(f"{archive} has a wrong checksum: delete it, and the next run downloads it again")
    try:
        try:
            train, test = (CIFAR10(root, train=train) for train in (True, False))
        except RuntimeError:  # not unpacked yet, or not whole
            download_url(CIFAR10.url, root, ARCHIVE, CIFAR10.tgz_md5)  # unless it is there
            (root / UNPACKED).mkdir(exist_ok=True)
            with tarfile.open(archive) as tar:  # only files with these names: no other can go anywhere
                for name in [*names, "batches.meta"]:
                    content = tar.extractfile(f"{UNPACKED}/{name}").read()
                    (root / UNPACKED / name).write_bytes(content)
            train, test = (CIFAR10(root, train=train) for train in (True, False))
    except (OSError, RuntimeError, KeyError, tarfile.TarError) as error:
        way_out = "put the python archive or folders train/<class> and test/<class> there"
        problem = f"no CIFAR-10 in {root}, and its download failed ({error})"
        raise UserError(f"{problem}: {way_out}, or try --dataset digits")

    def tensors(split):
        images, labels = torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)
        rank = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]  # 1 for the first of its class …
        order = (rank * len(CIFAR10_CLASSES) + labels).argsort()
        return images[order], labels[order]

    return Dataset(*tensors(train), *tensors(test), CIFAR10_CLASSES, "CIFAR-10, python archive")


def _image_folders(root):
    """CIFAR-10 as folders of images. What they hold is kept in root/decoded.pt, so that only the first start
    decodes them; the names, sizes and times of the files tell whether it still holds."""
    files = {split: _list_images(root / split) for split in ("train", "test")}

    def decode():
        decoded = {}
        for split, paths in files.items():
            with ThreadPoolExecutor() as pool:
                images = tqdm(pool.map(read_image, paths), f"reading {root / split}", len(paths), leave=False)
                decoded[f"{split}_images"] = torch.stack(list(images))
            labels = [CIFAR10_CLASSES.index(path.parent.name) for path in paths]
            decoded[f"{split}_labels"] = torch.tensor(labels)
        return decoded

    paths = files["train"] + files["test"]
    stats = ((path.parts[-3:], path.stat()) for path in paths)
    listing = [(*names, stat.st_size, stat.st_mtime_ns) for names, stat in stats]
    fingerprint = hashlib.sha256(repr(listing).encode()).hexdigest()
    decoded = checkpoint.cached(root / "decoded.pt", fingerprint, decode)
    tensors = (decoded[field] for field in Dataset._fields[:4])
    extensions = sorted({path.suffix[1:].lower() for path in paths})
    return Dataset(*tensors, CIFAR10_CLASSES, f"CIFAR-10, {' and '.join(extensions)} files")


def _list_images(folder):
    """The paths of all images: the first of each class, then the second of each, and so on."""
    by_class = []
    for name in CIFAR10_CLASSES:
        if not (folder / name).is_dir():
            raise UserError(f"the class folder {folder / name} is missing: every class needs one")
        found = sorted((folder / name).iterdir(), key=str)
        paths = [path for path in found if path.suffix.lower() in EXTENSIONS]
        if not paths:
            raise UserError(f"the class folder {folder / name} has no images: put them there")
        by_class.append(paths)
    return [path for row in itertools.zip_longest(*by_class) for path in row if path]


def read_image(path):
    """An image file as uint8 [3, 32, 32]: centre-cropped to a square and shrunk with antialiasing where it is
    not that size already. Raises `UserError` if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: PIL would cut them off at 255
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no image {path}: name an image file or the number of a test image")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): fix, replace or remove it")
    return _to_square(image)


def _to_square(image):
    if image.size != (SIDE, SIDE):
        image = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def is_present(name, directory):
    """Whether `load` needs no download. Raises `UserError` if there is no such folder."""
    root = Path(directory)
    if name == "cifar10" and not root.is_dir() and root != Path("data"):  # data, the default, is made
        raise UserError(f"no folder {root}: name the one that has CIFAR-10 with --data")
    return name == "digits" or any((root / part).exists() for part in ("test", ARCHIVE, UNPACKED))


def select_image(image, name, directory, classes):
    """The image to look at: (uint8 [3, 32, 32], what it is in words). `image` is the number of a test image,
    an image file, or None: the first test image, or, without that data, a photograph that scikit-learn ships.
    `classes` are those that the network knows. Raises `UserError`."""
    if image is not None and not (image.isdecimal() and len(image) < 10):
        return read_image(image), Path(image).name
    if not is_present(name, directory) and image is None:
        from sklearn.datasets import load_sample_image

        way_out = "python train.py downloads it, --data names another folder"
        print(f"no CIFAR-10 in {directory} ({way_out}): using scikit-learn's photograph of a flower")
        return _to_square(Image.fromarray(load_sample_image("flower.jpg"))), "a flower"
    dataset, index = load(name, directory, classes), int(image or 0)
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
