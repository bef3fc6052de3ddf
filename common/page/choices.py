"""The images that one can choose in the explorer from its start: those of --image, and photographs."""

from pathlib import Path

from common import cli, data
from common.images import is_image_file

PHOTOGRAPHS = {"a cat": "chelsea.png", "a horse": "horse.png", "a rocket": "rocket.jpg"}  # of scikit-image


def starting_images(args, network):
    """{name: uint8 [3, S, S], or the path of an image file}: what --image names and the photographs, or the
    first digit for a network that knows digits. Downloads nothing. Raises `UserError`."""
    images, digits = own_images(args, network), list(network.classes) == data.CLASSES["digits"]
    if not digits:
        images |= photographs()
    if not images:
        first = "0" if digits else None  # None is a photograph where CIFAR-10 is not there
        image, name = data.select_image(first, args.dataset, args.data, network.classes, network.crop)
        images = {name: image}
    return images


def own_images(args, network):
    """What --image names, {name: uint8 [3, S, S] or a path}: files, folders, numbers of test images. Raises
    `UserError`."""
    found = {}
    for image in args.image:
        if Path(image).is_dir():
            files = sorted(filter(is_image_file, Path(image).iterdir()))
            if not files:
                raise cli.UserError(f"no images in the folder {image}: name another, or an image file")
            found |= {file.name if file.name not in found else str(file): file for file in files}
        elif image.isdecimal() and not data.is_present(args.dataset, args.data):
            raise cli.UserError(f"no test image {image} without CIFAR-10 in {args.data}: name an image file")
        else:
            pixels, name = data.select_image(image, args.dataset, args.data, network.classes, network.crop)
            found[name if name not in found else image] = pixels
    return found


def photographs():
    """{name: path} of scikit-image's photographs that show, or nearly, a class of CIFAR-10."""
    import skimage

    files = {name: Path(skimage.__file__).parent / "data" / file for name, file in PHOTOGRAPHS.items()}
    return {name: file for name, file in files.items() if file.is_file()}
