"""Finding, reading, caching and preparing the images."""

import hashlib
import itertools
import os
import pickle
import shutil
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from common import data
from common.cli import UserError


def test_folders_hold_what_torchvision_reads(image_folders):
    dataset = data.load("cifar10", image_folders)
    expected = ImageFolder(image_folders / "train")
    assert dataset.classes == expected.classes
    by_class = {label: [] for label in range(10)}
    for image, label in expected:
        by_class[label].append(np.asarray(image))
    assert dataset.train_images.shape == (60, 3, 32, 32)
    for image, label in zip(dataset.train_images, dataset.train_labels):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), by_class[int(label)].pop(0))
    assert dataset.test_images.shape == (30, 3, 32, 32)


def test_any_part_of_the_images_has_all_classes(image_folders):
    labels = data.load("cifar10", image_folders).train_labels
    assert sorted(labels[:10].tolist()) == sorted(labels[-10:].tolist()) == list(range(10))


def test_cache_is_used_and_notices_a_changed_folder(image_folders, tmp_path, monkeypatch):
    root = shutil.copytree(image_folders, tmp_path / "copy")
    (root / "decoded.pt").unlink(missing_ok=True)
    before = data.load("cifar10", root)
    with monkeypatch.context() as patch:  # from here on, decoding is an error
        patch.setattr(data, "read_image", lambda path: pytest.fail("decoded again"))
        again = data.load("cifar10", root)
    assert torch.equal(before.train_images, again.train_images)

    changed = root / "train" / "cat" / "0000.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    images = data.load("cifar10", root).train_images
    assert (images[3] == torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)).all()

    (root / "test" / "dog" / "0002.png").unlink()
    assert len(data.load("cifar10", root).test_images) == 29

    (root / "decoded.pt").write_bytes(b"rubbish")
    assert len(data.load("cifar10", root).test_images) == 29


def test_a_new_time_alone_is_a_change(image_folders, tmp_path, monkeypatch):
    root = shutil.copytree(image_folders, tmp_path / "copy")
    data.load("cifar10", root)
    os.utime(root / "test" / "cat" / "0000.png", (time.time() + 5, time.time() + 5))
    decoded = []
    real = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: decoded.append(path) or real(path))
    data.load("cifar10", root)
    assert len(decoded) == 90


def make_archive(root, monkeypatch):
    """A python archive of CIFAR-10 with few images, and its checksums told to torchvision."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": random.integers(0, 10, 20).tolist()}

    contents = {name: batch() for name, _ in CIFAR10.train_list + CIFAR10.test_list}
    train = [write(name, contents[name]) for name, _ in CIFAR10.train_list]
    test = [write(name, contents[name]) for name, _ in CIFAR10.test_list]
    meta = write("batches.meta", {"label_names": list(data.CIFAR10_CLASSES)})
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta[1]})
    checksum = hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum)
    return contents


def test_archive_packed_or_unpacked(tmp_path, monkeypatch):
    contents = make_archive(tmp_path, monkeypatch)
    for remove in (None, CIFAR10.base_folder):
        if remove:
            shutil.rmtree(tmp_path / remove)
        dataset = data.load("cifar10", tmp_path)
        names = [name for name, _ in CIFAR10.train_list]
        labels = [label for name in names for label in contents[name]["labels"]]
        by_class = [[i for i, label in enumerate(labels) if label == k] for k in range(10)]
        turns = itertools.chain(*itertools.zip_longest(*by_class))  # as in folders
        turns = [i for i in turns if i is not None]
        expected = np.concatenate([contents[name]["data"] for name in names])[turns]
        assert np.array_equal(dataset.train_images.numpy(), expected.reshape(-1, 3, 32, 32))
        assert dataset.train_labels.tolist() == [labels[i] for i in turns]
        assert sorted(dataset.test_labels.tolist()) == sorted(contents["test_batch"]["labels"])
        assert list(dataset.classes) == list(data.CIFAR10_CLASSES)


def test_archive_with_a_wrong_checksum_is_named(tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(b"not the archive")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz has a wrong checksum: delete it"):
        data.load("cifar10", tmp_path)


def test_archive_members_stay_in_the_data_folder(tmp_path, monkeypatch):
    root = tmp_path / "data"
    make_archive(root, monkeypatch)
    (tmp_path / "loot").write_text("loot")
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:  # right checksum, wrong intent
        archive.add(tmp_path / "loot", "../escaped")
        archive.add(root / CIFAR10.base_folder, CIFAR10.base_folder)
        archive.add(tmp_path / "loot", f"{CIFAR10.base_folder}/../../escaped")
    checksum = hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest()
    shutil.rmtree(root / CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum)
    assert len(data.load("cifar10", root).test_images) == 20
    assert not (tmp_path / "escaped").exists()
    assert sorted(p.name for p in tmp_path.rglob("*") if "batch" not in p.name) == [
        CIFAR10.filename,
        "data",
        "loot",
    ]


def test_archive_that_lacks_a_batch_is_named(tmp_path, monkeypatch):
    make_archive(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch_2", "0"]])
    with pytest.raises(UserError, match=f"no CIFAR-10 in {tmp_path}.*test_batch_2"):
        data.load("cifar10", tmp_path)


def test_download_that_fails_says_so(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    with pytest.raises(UserError, match="download failed .no route to host.*--dataset digits"):
        data.load("cifar10", tmp_path)


def test_digits_are_those_of_scikit_learn():
    dataset = data.load("digits", "nowhere")
    assert dataset.train_images.shape == (1437, 3, 32, 32) and len(dataset.test_images) == 360
    assert dataset.train_images.dtype == torch.uint8 and dataset.train_images.max() > 240
    assert torch.bincount(dataset.test_labels, minlength=10).min() >= 34
    together = torch.cat([dataset.train_images, dataset.test_images])
    assert len(together.flatten(1).unique(dim=0)) == 1797  # no image is in both parts


@pytest.mark.parametrize("size", [32, 64, 97, 160, 224])
def test_resize_is_torchvisions_within_one_grey_level(size):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    ours = data.normalize_and_resize(images, size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) * 255
    expected = v2.functional.resize(images, [size, size])
    assert (ours.round() - expected.float()).abs().max() <= 1


def test_each_channel_is_normalized():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = v2.functional.normalize(images / 255, mean, std)
    ours = data.normalize_and_resize(images, 32, mean, std)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shift", [0, 2, 4])
def test_crop_and_flip_are_torchvisions(shift):
    """Each image is padded by reflection, cropped at its own place, and flipped if drawn."""
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    for batch in data.epoch_batches(60, 20, seed=3, epoch=1, shift=shift, flip=True):
        result = data.augment(images, batch)
        assert result.is_contiguous(memory_format=torch.channels_last)
        for i in range(20):
            image = v2.functional.pad(images[batch.indices[i]], [shift] * 4, padding_mode="reflect")
            top, left = shift + int(batch.top[i]), shift + int(batch.left[i])
            image = v2.functional.crop(image, top, left, 32, 32)
            assert torch.equal(result[i], v2.functional.hflip(image) if batch.flip[i] else image)


def test_batches_are_shuffled_cropped_and_flipped():
    batches = data.epoch_batches(5000, 100, seed=0, epoch=0, shift=4, flip=True)
    indices, top, left, flip = (torch.cat(part) for part in zip(*batches))
    assert sorted(indices.tolist()) == list(range(5000))
    for offsets in (top, left):  # each equally often
        assert offsets.min() == -4 and torch.bincount(offsets + 4, minlength=9).min() > 450
    assert 0.45 < flip.float().mean() < 0.55
    other = data.epoch_batches(5000, 100, seed=0, epoch=1, shift=4, flip=True)
    assert not torch.equal(batches[0].indices, other[0].indices)
    again = data.epoch_batches(5000, 100, seed=0, epoch=0, shift=4, flip=True)
    for batch, same in zip(batches, again):
        assert all(torch.equal(a, b) for a, b in zip(batch, same))


def test_batches_without_augmentation_take_images_as_they_are():
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    (batch,) = data.epoch_batches(10, 10, seed=0, epoch=0)
    assert torch.equal(data.augment(images, batch), images[batch.indices])


def test_batches_are_whole_unless_there_is_only_one():
    assert [len(batch.indices) for batch in data.epoch_batches(100, 32, seed=0, epoch=0)] == [32, 32, 32]
    assert [len(batch.indices) for batch in data.epoch_batches(100, 500, seed=0, epoch=0)] == [100]


def test_an_image_file_is_cropped_and_shrunk(tmp_path):
    wide = np.zeros((64, 200, 3), np.uint8)
    wide[:, 68:132] = (10, 200, 30)  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = data.read_image(tmp_path / "wide.png")
    assert image.shape == (3, 32, 32)
    assert image[:, :, 1:-1].flatten(1).unique(dim=1).flatten().tolist() == [10, 200, 30]


def test_images_of_any_size_and_depth_are_read(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert data.read_image(tmp_path / "dot.png").flatten(1).unique(dim=1).flatten().tolist() == [9, 8, 7]
    Image.fromarray(np.full((40, 40), 100 * 256 + 7, np.uint16)).save(tmp_path / "deep.png")
    assert data.read_image(tmp_path / "deep.png").unique().tolist() == [100]
    wide = Image.new("RGB", (20_000, 32), "black")
    wide.paste("white", (9_984, 0, 10_016, 32))
    wide.save(tmp_path / "wide.png")
    assert (data.read_image(tmp_path / "wide.png") == 255).all()
    frames = [Image.new("L", (32, 32), value) for value in (50, 200)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert data.read_image(tmp_path / "film.gif").unique().tolist() == [50]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_images_of_other_kinds_are_read(tmp_path, mode):
    kind = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (40, 40), "white").convert(mode).save(tmp_path / f"x.{kind}")
    assert data.read_image(tmp_path / f"x.{kind}").float().mean() > 250
