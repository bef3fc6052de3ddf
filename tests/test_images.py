"""Reading image files of any kind: as they are meant to be seen, or one line that names the file."""

import os
import struct

import fuzz_images
import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from common.images import read_image


def test_an_image_file_is_cropped_and_shrunk(tmp_path):
    wide = np.zeros((64, 200, 3), np.uint8)
    wide[:, 68:132] = (10, 200, 30)  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png")
    assert image.shape == (3, 32, 32)
    assert image[:, :, 1:-1].flatten(1).unique(dim=1).flatten().tolist() == [10, 200, 30]


def test_images_of_any_size_and_depth_are_read(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert read_image(tmp_path / "dot.png").flatten(1).unique(dim=1).flatten().tolist() == [9, 8, 7]
    Image.fromarray(np.full((40, 40), 100 * 256 + 7, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").unique().tolist() == [100]
    wide = Image.new("RGB", (20_000, 32), "black")
    wide.paste("white", (9_984, 0, 10_016, 32))
    wide.save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == 255).all()
    frames = [Image.new("L", (32, 32), value) for value in (50, 200)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "film.gif").unique().tolist() == [50]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_images_of_other_kinds_are_read(tmp_path, mode):
    kind = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (40, 40), "white").convert(mode).save(tmp_path / f"x.{kind}")
    assert read_image(tmp_path / f"x.{kind}").float().mean() > 250


def greys(path):
    """The grey levels of an image that is read."""
    image = read_image(path)
    assert (image == image[:1]).all()
    return image[0].numpy().astype(int)


RAMP = np.linspace(0, 1, 1024).reshape(32, 32)
DEEP = {  # what an image holds, and by what it is divided to be a ramp from 0 to 1
    "floats.tif": RAMP.astype(np.float32),
    "floats.pfm": RAMP.astype(np.float32),
    "thousands.tif": (RAMP * 4321 - 1000.5).astype(np.float32),
    "overshoot.tif": (RAMP * 1.04 - 0.02).astype(np.float32),
    "above.tif": (RAMP * 1.03).astype(np.float32),
    "bytes as floats.tif": np.round(RAMP * 255).astype(np.float32),
    "bytes as integers.tif": np.round(RAMP * 255).astype(np.int32),
    "32 bits.tif": (RAMP * 2e9).astype(np.int32),
    "32 bits signed.tif": (RAMP * 4e9 - 2e9).astype(np.int32),
    "16 bits signed.tif": (RAMP * 60000 - 30000).astype(np.int16),
    "12 bits in 32.tif": (RAMP * 4095).astype(np.int32),
    "12 bits in 16.tif": (RAMP * 4095).astype(np.uint16),
    "16 bits.tif": (RAMP * 65535).astype(np.uint16),
    "16 bits big-endian.tif": (RAMP * 65535).astype(">u2"),
    "16 bits.png": (RAMP * 65535).astype(np.uint16),
    "10 bits in 16.png": (RAMP * 1023).astype(np.uint16),
    "16 bits.pgm": (RAMP * 65535).astype(np.uint16),
    "a mask.png": np.round(RAMP).astype(np.uint16),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_scaled_to_what_they_show(name, tmp_path):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    expected = np.round(RAMP) if name == "a mask.png" else RAMP
    assert np.abs(greys(tmp_path / name) - 255 * expected).max() <= 1


def test_32_bits_without_a_sign_and_white_at_zero(tmp_path):
    values = (RAMP * (2**32 - 1)).astype(np.uint32)
    Image.fromarray(values.view(np.int32)).save(tmp_path / "x.tif")  # signed, says its field 339
    signed = (tmp_path / "x.tif").read_bytes()
    unsigned = signed.replace(struct.pack("<HHIH", 339, 3, 1, 2), struct.pack("<HHIH", 339, 3, 1, 1))
    assert unsigned != signed
    (tmp_path / "x.tif").write_bytes(unsigned)
    assert np.abs(greys(tmp_path / "x.tif") - 255 * RAMP).max() <= 1
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(tmp_path / "y.tif", tiffinfo={262: 0})
    assert np.abs(greys(tmp_path / "y.tif") - 255 * (1 - RAMP)).max() <= 1


@pytest.mark.parametrize("value", [0, 0.5, 1, -7, 1e30])
def test_deep_image_of_one_value(value, tmp_path):
    Image.fromarray(np.full((40, 40), value, np.float32)).save(tmp_path / "x.tif")
    assert abs(greys(tmp_path / "x.tif") - {0: 0, 0.5: 127.5, 1: 255}.get(value, 0)).max() <= 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_deep_image_that_is_not_finite_is_refused(value, tmp_path):
    values = RAMP.astype(np.float32)
    values[3, 4] = value
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(
        UserError, match="x.tif cannot be read as an image .it has values that are not finite"
    ):
        read_image(tmp_path / "x.tif")


def test_transparent_images_are_on_white(tmp_path):
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 32, 64))  # the left half is black, the right one is nothing
    drawing.save(tmp_path / "drawing.png")
    drawing.save(tmp_path / "drawing.webp", lossless=True)
    drawing.save(tmp_path / "drawing.tif")
    drawing.convert("LA").save(tmp_path / "grey.png")
    palette = Image.new("P", (64, 64), 1)  # colour 1 is red, and transparent
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 32, 64))
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    palette.save(tmp_path / "parts.png", transparency=b"\xff\x00")
    key = Image.new("RGB", (64, 64), (9, 8, 7))
    key.paste((0, 0, 0), (0, 0, 32, 64))
    key.save(tmp_path / "key.png", transparency=(9, 8, 7))
    key.convert("L").save(tmp_path / "grey key.png", transparency=key.convert("L").getpixel((63, 0)))
    deep = np.full((64, 64), 30_000, np.uint16)
    deep[:, :32] = 0
    Image.fromarray(deep).save(tmp_path / "deep key.png", transparency=30_000)
    for path in sorted(tmp_path.iterdir()):
        image = greys(path)
        assert (image[:, :15] == 0).all() and (image[:, 17:] == 255).all(), path
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png")[:, 0, 0].tolist() == [255, 127, 127]


def photograph(path, exif, **options):
    """A photograph lying on its side: its left half, which belongs on top, is white."""
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    image.save(path, exif=exif, **options)


def is_turned(path):
    image = greys(path)
    return image[2].min() > 200 and image[-2].max() < 50


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_orientation_is_followed(extension, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(tmp_path / f"x.{extension}", exif)
    assert is_turned(tmp_path / f"x.{extension}")


def entry(tag, kind, count, value):
    return struct.pack("<HHII", tag, kind, count, value)


def exif_of(*entries, count=None):
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count or len(entries)) + b"".join(entries)


TURN = entry(0x0112, 3, 1, 6)
DAMAGED = {  # EXIF data, and whether its orientation can still be known
    "nothing": (b"Exif\0\0", False),
    "rubbish": (b"Exif\0\0" + bytes(range(200)), False),
    "cut in its header": (b"Exif\0\0II*", False),
    "cut in an entry": (exif_of(TURN)[:-7], False),
    "more entries than are there": (exif_of(TURN, count=9999), None),
    "an offset out of it": (exif_of(TURN, entry(0x010E, 2, 900, 2**31)), None),
    "an entry of no kind": (exif_of(TURN, entry(0x011A, 99, 1, 5)), None),
    "a fraction cut off": (exif_of(TURN, entry(0x011A, 5, 1, 60)), None),
    "a folder in itself": (exif_of(TURN, entry(0x8769, 4, 1, 8)), None),
    "orientation 77": (exif_of(entry(0x0112, 3, 1, 77)), False),
    "orientation in words": (exif_of(entry(0x0112, 2, 4, 0x41414141)), False),
    "many orientations": (exif_of(entry(0x0112, 3, 2, 0x00060006)), None),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_damaged_exif_data_is_ignored(case, extension, tmp_path):
    exif, turned = DAMAGED[case]
    photograph(tmp_path / f"x.{extension}", exif)
    image = greys(tmp_path / f"x.{extension}")
    assert {(image[0] > 200).sum(), (image[:, 0] > 200).sum()} == {16, 32}  # sound, turned or not
    assert turned in (None, is_turned(tmp_path / f"x.{extension}"))


UNREADABLE = {
    "a HEIC.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC; what is read is PNG, JPEG.*: convert"),
    "another HEIC.jpg": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "it is HEIC; what is read is PNG, JPEG"),
    "an AVIF.png": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "it is AVIF; what is read is PNG, JPEG"),
    "nothing.png": (b"", "it is empty"),
    "a drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is damaged, or not PNG, JPEG"),
    "a document.jpg": (b"%PDF-1.7", "it is damaged, or not PNG, JPEG"),
    "a script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is damaged, or not PNG, JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_are_no_images_are_told_in_one_line(name, tmp_path):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as an image .{message}"):
        read_image(tmp_path / name)


def test_what_is_no_file_is_told(tmp_path):
    os.symlink("nowhere", tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    for name, message in {
        "link.png": "it is a broken link",
        "pipe.png": "it is not a regular file",
        ".": "it is a folder",
    }.items():
        with pytest.raises(UserError, match=f"cannot be read as an image .{message}"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="no image .*none.png: name an image file or"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), RecursionError(), MemoryError(), KeyError(1), EOFError()]
)
def test_whatever_a_decoder_raises_is_one_line(error, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")

    def load(image):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(UserError, match="x.png cannot be read as an image .[A-Za-z1]+.: fix, replace"):
        read_image(tmp_path / "x.png")


def test_damaged_files_give_an_image_or_one_line(capfd):
    problems = fuzz_images.main(["--count", "1000"])
    out, err = capfd.readouterr()
    assert out.startswith("1,000 damaged files in ") and not err  # libtiff has its own way of printing
    assert 200 < sum(problems.values()) < 900 and len(problems) > 50


def test_fuzz_notices_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_images, "damage", lambda content, random: b"damaged")
    monkeypatch.setattr("common.images._foreign_format", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuzz_images.main(["--count", "1"])
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == b"damaged" and f"{kept.name} is the file" in capsys.readouterr().out
