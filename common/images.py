"""Reading image files: as images of 32×32 or as photographs, or one line that says why one cannot be read."""

import contextlib
import logging
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from common.cli import UserError

SIDE = 32  # pixels: what an image is before it is resized for the network
FORMATS = "PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"  # not those for which PIL starts programs
READABLE = "PNG, JPEG, GIF, BMP, PPM, TIFF or WebP"
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}
DEPTHS = 1, 255, 1023, 4095, 65535  # the largest value of an image of floats, or of 8, 10, 12 or 16 bits
# What formats call themselves, by the first letters of their name in a file.
BRANDS = {b"hei": "HEIC", b"hev": "HEIC", b"mif": "HEIC", b"msf": "HEIC", b"avi": "AVIF"}

warnings.filterwarnings("ignore", module=r"PIL\.")  # where PIL has doubts, the image is read without a word
logging.getLogger("PIL").setLevel(logging.CRITICAL)
_libtiff = threading.Lock()


def read_image(path, crop=None):
    """An image file as uint8 [3, 32, 32]: on white where it is transparent, centre-cropped to a square and
    shrunk with antialiasing where it is not that size already. With `crop` as uint8 [3, crop, crop], as
    networks of photographs see it. Raises `UserError` if it cannot be read."""
    path, way_out = Path(path), "fix, replace or remove it"
    try:
        if path.is_file():
            return crop_and_shrink(_decode(path), crop)
        if path.is_dir():
            problem = "it is a folder"
        elif path.exists():
            problem = "it is not a regular file"
        else:
            problem = "it is a broken link" if path.is_symlink() else ""
    except UnidentifiedImageError:
        problem, way_out = _foreign_format(path), "convert, replace or remove it"
    except Exception as error:  # decoders raise all kinds
        problem = getattr(error, "strerror", None) or str(error)[:120] or type(error).__name__
    if not problem:
        raise UserError(f"no image {path}: name an image file or the number of a test image")
    raise UserError(f"{path} cannot be read as an image ({problem}): {way_out}") from ValueError(problem)


def _decode(path):
    """The first image of a file, as it is to be seen, in mode RGB or RGBA."""
    with Image.open(path, formats=FORMATS) as image:
        with _silent_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # the metadata is damaged, the pixels are sound
            orientation = None
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image)
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.info.clear()
    if orientation in range(2, 9):
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    return image


@contextlib.contextmanager
def _silent_libtiff():
    """Context manager: what libtiff prints of a damaged file, itself and at once, is dropped."""
    with _libtiff, open(os.devnull, "wb") as devnull, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it is closed
            stderr = os.dup(2)
            stack.callback(os.close, stderr)
            stack.callback(os.dup2, stderr, 2)
            os.dup2(devnull.fileno(), 2)
        yield


def _to_8_bits(image):
    """An image of 16 or 32 bits or of floats, in mode L. Whole numbers, and floats from 0 to 1, are scaled by
    the first of `DEPTHS` that holds them all, others from their own lowest to their own highest. Raises
    `ValueError` for NaN or infinity."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    if image.mode == "I" and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # PIL takes them for signed
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    transparent, values = values == image.info.get("transparency"), values.astype(np.float64)
    low, high = values.min(), values.max()
    if low >= 0 and (high <= 1 or high <= DEPTHS[-1] and not (values % 1).any()):
        values /= next(depth for depth in DEPTHS if high <= depth)
    else:
        values = (values - low) / (high - low or 1)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # in these, white is 0
        values = 1 - values
    values[transparent] = 1
    return Image.fromarray((255 * values).round().astype(np.uint8))


def is_image_file(path):
    """Whether that is the name of an image file, and not a hidden one, such as those that a Mac adds."""
    path = Path(path)
    return path.name[0] != "." and path.suffix.lower() in EXTENSIONS


class Photographs:
    """The image files in a folder and in those below it, as networks of photographs see them: uint8 [3, crop,
    crop] each, read when it is asked for. Raises `UserError` if there are none, or one cannot be read."""

    def __init__(self, folder, crop):
        self.folder, self.crop, self.paths, seen = Path(folder), crop, [], set()
        for parent, folders, files in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(parent)) in seen:  # links may lead in a circle
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if name[0] != "."]  # hidden
            self.paths += [Path(parent, name) for name in files if is_image_file(name)]
        self.paths.sort()
        if not self.paths:
            raise UserError(f"no images in {folder}: --data names a folder of image files")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_image(self.paths[index], self.crop)

    def name(self, index):
        """The folder that an image is in, perhaps its class, or else its own name."""
        path = self.paths[index].relative_to(self.folder)
        return path.parent.name or path.name


def crop_and_shrink(image, crop=None):
    """A PIL image in mode RGB or RGBA as uint8 [3, 32, 32] or [3, crop, crop], as `read_image` says. For a
    `crop` of 224 the shorter side becomes 256, as in what torchvision's ImageNet weights come with."""
    if crop:
        longest = 8 * min(image.size)  # a ribbon would fill the memory
        width, height = (min(length, longest) for length in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        side, shorter = round(crop * 256 / 224), min(image.size)
        image = image.resize([side * length // shorter for length in image.size], Image.Resampling.BILINEAR)
        left, top = (round((length - crop) / 2) for length in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    elif image.size != (SIDE, SIDE):
        image = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BILINEAR)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _foreign_format(path):
    """What a file is that PIL does not know, in words."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:11] in BRANDS:
        return f"it is {BRANDS[head[8:11]]}; what is read is {READABLE}"
    return f"it is damaged, or not {READABLE}" if head else "it is empty"


def photograph(crop=None):
    """(uint8 [3, 32, 32] or [3, crop, crop], what it is): one that comes with scikit-image or, without that,
    scikit-learn."""
    try:
        from skimage.data import chelsea  # these take seconds to import: only where they are used

        return crop_and_shrink(Image.fromarray(chelsea()), crop), "a cat"
    except Exception:  # its package has no images, and none can be downloaded
        from sklearn.datasets import load_sample_image

        return crop_and_shrink(Image.fromarray(load_sample_image("flower.jpg")), crop), "a flower"
