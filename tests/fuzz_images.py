"""Reads 100,000 damaged image files: each must give an image, or one line that names the file, no more.
python -m tests.fuzz_images"""

import collections
import io
import random
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from common import cli
from common.images import read_image

EXTREMES = [
    b"\0\0",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x01\0\0\0",
    b"\x80",
]


def seeds():
    """{name: bytes} of sound image files, of many kinds."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    noise[8:32] //= 4  # so that there is something to compress
    rgba, exif, text = Image.fromarray(noise), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description", 72.0
    text.add_text("comment", "x" * 50, zip=True)
    rgb, grey, palette = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").quantize(16)
    deep = np.asarray(grey).astype(np.uint16) * 257
    real, whole = Image.fromarray(deep.astype(np.float32) / 65535), Image.fromarray(deep.astype(np.int32))
    deep = Image.fromarray(deep)
    kinds = {
        "rgb.png": (rgb, dict(exif=exif, pnginfo=text)), "rgba.png": (rgba, {}), "deep.png": (deep, {}),
        "palette.png": (palette, dict(transparency=b"\0\x80")), "1.png": (rgb.convert("1"), {}),
        "grey.png": (grey, dict(transparency=7)), "rgb.jpg": (rgb, dict(exif=exif, dpi=(72, 72))),
        "grey.jpg": (grey, dict(comment="a comment")), "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "slow.jpg": (rgb, dict(progressive=True, exif=exif)), "rgb.tif": (rgb, dict(exif=exif)),
        "deep.tif": (deep, {}), "real.tif": (real, {}), "whole.tif": (whole, {}),
        "lzw.tif": (rgba, dict(compression="tiff_lzw")), "zip.tif": (real, dict(compression="tiff_deflate")),
        "jpeg.tif": (rgb, dict(compression="jpeg")), "1.tif": (rgb.convert("1"), dict(compression="group4")),
        "palette.gif": (palette, dict(transparency=3)), "rgb.webp": (rgb, dict(exif=exif)),
        "film.gif": (palette, dict(save_all=True, append_images=[grey])),
        "rgba.webp": (rgba, dict(lossless=True)), "rgb.bmp": (rgb, {}), "rgb.ppm": (rgb, {}),
        "film.webp": (rgba, dict(save_all=True, append_images=[rgb])), "real.pfm": (real, {}),
    }  # fmt: skip
    formats, files = dict(jpg="JPEG", tif="TIFF", pfm="PPM"), {}
    for name, (image, options) in kinds.items():
        file, kind = io.BytesIO(), name.split(".")[1]
        image.save(file, formats.get(kind, kind), **options)
        files[name] = file.getvalue()
    return files


def damage(content, random):
    """A copy with some of its bytes changed, left out, doubled or put in, mostly near its beginning."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        end = random.choice((32, 256, len(content)))
        place = random.randrange(min(end, len(content)) or 1)
        size = random.choice((1, 2, 4, 16, 200))
        kind = random.randrange(6)
        if kind == 0:
            content[place : place + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            extreme = random.choice(EXTREMES)
            content[place : place + len(extreme)] = extreme
        elif kind == 2:
            content[place : place + size] = random.randbytes(size)
        elif kind == 3:
            del content[place : place + size]
        elif kind == 4:
            content[place:place] = content[place : place + size]
        elif random.random() < 0.3:
            del content[place:]
    return repaired(content) if random.random() < 0.7 else bytes(content)


def repaired(content):
    """With the right checksums, if it is a PNG: otherwise its reader looks no further."""
    place = 8
    while content[:4] == b"\x89PNG" and place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


def problem_of(path):
    """Reads the file; returns "" for an image, or the one line, without the path. Raises what is neither."""
    try:
        image = read_image(path)
    except cli.UserError as error:
        line = str(error)
        assert str(path) in line and "\n" not in line and len(line) < 250 + len(str(path)), line
        return line.replace(str(path), "")
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    return ""


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--count", type=cli.number(int, 1), default=100_000, metavar="N", help="default: 100000"
    )
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, metavar="N", help="default: 0")
    args = parser.parse_args(argv)
    files, choice, problems, began = seeds(), random.Random(args.seed), collections.Counter(), time.time()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2**20  # a large image only takes time
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.write_bytes(content)
                assert not problem_of(path), name
            for i in range(args.count):
                path = Path(folder, choice.choice(list(files)))
                content = damage(files[path.name], choice)
                path.write_bytes(content)
                try:
                    problems[problem_of(path)] += 1
                except BaseException:
                    kept = Path(f"fuzz_{args.seed}_{i}{path.suffix}")
                    kept.write_bytes(content)
                    print(f"{kept} is the file")
                    raise
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    images = problems.pop("", 0)
    print(f"{args.count:,} damaged files in {time.time() - began:.0f} s: {images:,} are read as images, and "
          f"{args.count - images:,} are told in one line, of {len(problems):,} different ones")  # fmt: skip
    return problems


if __name__ == "__main__":
    main()
