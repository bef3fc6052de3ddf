"""Finding, reading, caching and preparing the images."""

import errno
import hashlib
import http.server
import itertools
import os
import pickle
import shutil
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

import train
from common import archive, checkpoint, data
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
    for results in torch.arange(10), "a note", torch.zeros(()):  # the user's
        torch.save({"results": results}, root / "decoded.pt")
        before = (root / "decoded.pt").read_bytes()
        with pytest.raises(UserError, match="decoded.pt is where .* holds something else: move it elsewhere"):
            data.load("cifar10", root)
        assert (root / "decoded.pt").read_bytes() == before


def test_a_new_time_alone_is_a_change(image_folders, tmp_path, monkeypatch):
    root = shutil.copytree(image_folders, tmp_path / "copy")
    data.load("cifar10", root)
    os.utime(root / "test" / "cat" / "0000.png", (time.time() + 5, time.time() + 5))
    decoded = []
    real = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: decoded.append(path) or real(path))
    data.load("cifar10", root)
    assert [path.parts[-3:] for path in decoded] == [("test", "cat", "0000.png")]


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


def test_archive_members_stay_in_the_data_folder(tmp_path, monkeypatch):
    root = tmp_path / "data"
    make_archive(root, monkeypatch)
    (tmp_path / "loot").write_text("loot", encoding="utf-8")
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
    with pytest.raises(UserError, match=f"{tmp_path}/{CIFAR10.filename} is damaged.*test_batch_2 is missing"):
        data.load("cifar10", tmp_path)


@pytest.fixture
def no_download(monkeypatch):
    """Nothing may be downloaded."""
    monkeypatch.setattr(archive, "_download", lambda folder, problem: pytest.fail("it downloads"))


def files_in(folder):
    """What is there, with sizes and times."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


PACKED, UNPACKED = CIFAR10.filename, CIFAR10.base_folder
ARCHIVES = {  # what is done to a folder with the archive and what was in it, and what --data then names
    "packed": (f"rm -r {UNPACKED}", "."),
    "unpacked": (f"rm {PACKED}", "."),
    "the packed file itself": (f"rm -r {UNPACKED}", PACKED),
    "under another name": (f"rm -r {UNPACKED}; mv {PACKED} 'cifar (1).tgz'", "cifar (1).tgz"),
    "the inner folder itself": (f"rm {PACKED}", UNPACKED),
    "the inner folder as .": (f"rm {PACKED}; mv {UNPACKED}/* .; rmdir {UNPACKED}", "."),
    "a level deeper": (f"mkdir -p cifar-10-python; mv {UNPACKED} cifar-10-python; rm {PACKED}", "."),
    "in capitals": (f"rm {PACKED}; mv {UNPACKED} {UNPACKED.upper()}", "."),
    "without its compression": (f"rm -r {UNPACKED}; gunzip {PACKED}", "."),
    "unpacked in part beside it": (f"rm {UNPACKED}/data_batch_3; truncate -s 9 {UNPACKED}/test_batch", "."),
    "cut off beside what was in it": (f"truncate -s 1000 {PACKED}", "."),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archive_is_read_wherever_it_is(case, tmp_path, monkeypatch, no_download):
    make_archive(tmp_path, monkeypatch)
    commands, name = ARCHIVES[case]
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True)
    before = files_in(tmp_path)
    dataset = data.load("cifar10", tmp_path / name)
    assert len(dataset.train_images) == 100 and len(dataset.test_images) == 20
    assert files_in(tmp_path) == before  # nothing is unpacked to the disk
    test_only = data.load("cifar10", tmp_path / name, splits=["test"])
    assert torch.equal(test_only.test_images, dataset.test_images) and not len(test_only.train_images)


def class_folders(folder, names=data.CIFAR10_CLASSES):
    """An image in a folder of each of these names."""
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / name / "1.png")


CAPITALS = [name.upper() for name in data.CIFAR10_CLASSES]
FOLDERS = {  # the folders of classes, and what --data names
    "as they are": ({"train": data.CIFAR10_CLASSES, "test": data.CIFAR10_CLASSES}, "."),
    "in capitals": ({"Train": CAPITALS, "TEST": CAPITALS}, "."),
    "a level deeper": ({"x/train": data.CIFAR10_CLASSES, "x/test": data.CIFAR10_CLASSES}, "."),
    "a level above": ({"train": data.CIFAR10_CLASSES, "test": data.CIFAR10_CLASSES}, "train"),
    "the other level above": ({"train": data.CIFAR10_CLASSES, "Test": data.CIFAR10_CLASSES}, "Test"),
    "doubled": ({"train/train": data.CIFAR10_CLASSES, "test/images": data.CIFAR10_CLASSES}, "."),
    "beside others": ({"train": data.CIFAR10_CLASSES, "test": data.CIFAR10_CLASSES, "val": ["cat"]}, "."),
    "copied by a Mac": ({"x/train": CAPITALS, "x/test": CAPITALS, "__MACOSX/train": CAPITALS}, "."),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_found_where_they_can_only_mean_one_thing(case, tmp_path, no_download):
    folders, name = FOLDERS[case]
    for folder, names in folders.items():
        class_folders(tmp_path / folder, names)
    before = files_in(tmp_path)
    dataset = data.load("cifar10", tmp_path / name)
    for images, labels in (dataset[:2], dataset[2:4]):
        assert images[:, 0, 0, 0].tolist() == labels.tolist() == list(range(10))
    added = {path.name for path in files_in(tmp_path).keys() - before.keys()}
    assert (
        added == {"decoded.pt"}
        and before.items()
        >= {
            path: state for path, state in files_in(tmp_path).items() if path.is_file() and path in before
        }.items()
    )


def test_folder_as_dot_is_known_by_its_name(tmp_path, monkeypatch, no_download):
    for split in data.SPLITS:
        class_folders(tmp_path / split)
    monkeypatch.chdir(tmp_path / "test")
    assert len(data.load("cifar10", ".").train_images) == 10


def test_only_what_is_asked_for_must_be_there(tmp_path, no_download):
    class_folders(tmp_path / "one" / "train")
    class_folders(tmp_path / "other" / "TEST")
    class_folders(tmp_path / "flat")
    for name, split in (("one", "train"), ("other", "test"), ("flat", "train"), ("flat", "test")):
        dataset = data.load("cifar10", tmp_path / name, splits=[split])
        counts = {"train": len(dataset.train_images), "test": len(dataset.test_images)}
        assert counts == {"train": 0, "test": 0} | {split: 10}
    with pytest.raises(UserError, match="no train/ in .*other: it has TEST"):
        data.load("cifar10", tmp_path / "other", splits=["train"])


@pytest.mark.parametrize("split, flags", [("train", "--holdout 3"), ("test", "--evaluate")])
def test_train_asks_only_for_what_it_needs(split, flags, tmp_path, no_download):
    class_folders(tmp_path / split)
    args = train.parse([*flags.split(), "--data", str(tmp_path)])
    settings = dict(holdout=args.holdout, limit=None)
    dataset = train.load_data(args, settings, torch.device("cpu"))
    assert len(dataset.test_images) == (3 if args.holdout else 10)


def test_what_is_not_asked_for_may_be_broken(tmp_path, no_download):
    class_folders(tmp_path / "train", ["cat", "kitten"])
    (tmp_path / "train" / "cat" / "2.jpg").write_text("no image", encoding="utf-8")
    class_folders(tmp_path / "test")
    image, name = data.select_image("3", "cifar10", tmp_path, data.CIFAR10_CLASSES)
    assert name == "test image 3: cat" and image[0, 0, 0] == 3


NEARLY = [name for name in data.CIFAR10_CLASSES if name not in ("airplane", "automobile")]
BOTH = ["train", "test"]
UNFIT = {  # how a folder is made, in which of its folders the classes are, and what is said of it
    "class folders alone": ("", ["."], "no train/ and no test/ in cifar: it has airplane, .* and 4 more"),
    "val for test": ("mkdir val", ["train"], "no test/ in cifar: it has train, val, .*holdout N needs"),
    "one class missing": ("rm -r test/cat", BOTH, "cifar/test has no class folder cat: "),
    "an empty class": ("rm test/cat/*", BOTH, "cifar/test/cat has no images: it has nothing;"),
    "other kinds": ("cd train/cat; mv 1.png 1.heic", BOTH, "has no images: it has 1.heic; what is"),
    "a link to nothing": ("rm -r train/cat; ln -s x train/cat", BOTH, "cifar/train/cat cannot be read .it"),
    "a file": ("rm -r train/cat; touch train/cat", BOTH, "cat cannot be read .Not a directory"),
    "train is a file": ("touch train", ["test"], "cifar/train cannot be read .Not a directory"),
    "an image links to nothing": ("ln -s x test/dog/2.jpg", BOTH, "dog/2.jpg .*it is a broken link"),
    "a class twice": ("mkdir train/Cat", BOTH, "cifar/train has both Cat and cat: make one"),
    "two copies": ("mkdir x; mv t* x; cp -r x y", BOTH, "it has x, y; put .* or name one of x, y with"),
    "images alone": ("touch 1.png", [], "no CIFAR-10 in cifar: it has 1.png; put train/<class>/ and test/"),
    "notes": ("echo > notes.txt", [], "no CIFAR-10 in cifar: it has notes.txt; put train/<class>/ and test/"),
    "another data set": ("mkdir cifar-100-python", [], "CIFAR-10 in cifar: it has cifar-100-python; put"),
    "the binary version": ("touch data_batch_1.bin", [], "CIFAR-10 in cifar: it has data_batch_1.bin; put"),
    "not the archive": (f"echo x > {PACKED}", [], f"cifar/{PACKED} is damaged, or not CIFAR-10's python"),
    "another archive": (f"touch x; tar czf {PACKED} x; rm x", [], "data_batch_1 is missing.: delete it to"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_told_and_left_alone(case, tmp_path, monkeypatch, no_download):
    commands, folders, message = UNFIT[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar").mkdir()
    for folder in folders:
        class_folders(tmp_path / "cifar" / folder)
    subprocess.run(commands, shell=True, cwd="cifar", check=True)
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        data.load("cifar10", "cifar")
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    assert {path for path in files_in(tmp_path).keys() ^ before.keys() if path.name != "decoded.pt"} == set()


def test_names_that_differ_are_told(tmp_path):
    class_folders(tmp_path / "train", ["plane", "car", *NEARLY])
    class_folders(tmp_path / "test")
    message = "train has no class folder airplane, automobile, but car, plane: each of the ten needs its own"
    with pytest.raises(UserError, match=message):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("path", ["", "train", "test/cat"])
def test_folder_that_cannot_be_read_is_told(path, tmp_path, monkeypatch, no_download):
    for split in data.SPLITS:
        class_folders(tmp_path / split)
    real = os.listdir

    def listdir(folder):
        if folder == tmp_path / path:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UserError, match=f"the folder {tmp_path / path} cannot be read .Permission denied"):
        data.load("cifar10", tmp_path)


def test_links_and_names_that_lead_nowhere(tmp_path, monkeypatch, no_download):
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere", "data")
    (tmp_path / "text").write_text("text", encoding="utf-8")
    for name, message in {
        "data": "the folder data cannot be read .it is a broken link",
        "data/below": "no folder data/below: name the one",
        "text": "text is damaged, or not CIFAR-10's python archive .*name another with --data",
        "text/below": "no folder text/below: name the one",
        "x" * 300: "cannot be read .File name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            data.load("cifar10", name)


def test_hidden_files_are_no_images(tmp_path):
    for split in data.SPLITS:
        class_folders(tmp_path / split)
    for name in ("._1.png", ".DS_Store", ".hidden.jpg"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"no image")
    assert len(data.load("cifar10", tmp_path).train_images) == 10


def test_what_is_left_out_is_told(tmp_path, capsys):
    for split in data.SPLITS:
        class_folders(tmp_path / split)
    for i, name in enumerate(["a.jfif", "b.JPE", "c.gif", "d.webp", "e.pbm"]):
        kind = {"a.jfif": "JPEG", "b.JPE": "JPEG", "e.pbm": "PPM"}.get(name, name[2:])
        Image.new("RGB", (40, 40), (0, i, 0)).save(tmp_path / "train" / "cat" / name, kind)
    assert len(data.load("cifar10", tmp_path).train_images) == 15
    assert "ignored" not in capsys.readouterr().out
    for name in ("a.heic", "b.HEIC", "c.txt", "none"):
        (tmp_path / "train" / "cat" / name).touch()
    (tmp_path / "test" / "kitten").mkdir()
    assert len(data.load("cifar10", tmp_path).train_images) == 15
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"ignored in {tmp_path}: 2 .heic, ") and "(only PNG, JPEG" in line
    for kind in ("1 .txt", "1 without an extension", "1 folders"):
        assert kind in line


def test_broken_images_are_told_together_and_the_others_kept(tmp_path, monkeypatch):
    for split in data.SPLITS:
        class_folders(tmp_path / split)
    broken = [tmp_path / "test" / "dog" / f"{i:02}.jpg" for i in range(12)]
    for path in broken:
        path.write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match="12 images in .* cannot be read .the first: it is HEIC") as error:
        data.load("cifar10", tmp_path)
    for i in range(12):
        assert (f"test/dog/{i:02}.jpg" in str(error.value)) == (i < 10)
    assert str(error.value).endswith("09.jpg and 2 more")
    for path in broken[1:]:
        path.unlink()
    with pytest.raises(UserError, match="00.jpg cannot be read as an image .it is HEIC; what is read is PNG"):
        data.load("cifar10", tmp_path)
    broken[0].unlink()
    with monkeypatch.context() as patch:  # from here on, decoding is an error
        patch.setattr(data, "read_image", lambda path: pytest.fail("decoded again"))
        assert len(data.load("cifar10", tmp_path).test_images) == 10


def test_folder_that_cannot_be_written_is_read_without_a_cache(image_folders, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(image_folders, tmp_path / "copy")
    (root / "decoded.pt").unlink(missing_ok=True)

    def read_only(path, *args):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(checkpoint, "open", read_only, raising=False)
    assert len(data.load("cifar10", root).train_images) == 60
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the decoded images are not kept") and "Read-only file system" in line


def test_download_that_fails_says_so(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match="download failed .no route to host.*--dataset digits"):
        data.load("cifar10", tmp_path)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of the archive: `server.answers` tells how it answers each request in turn."""
    source = tmp_path / "source"
    make_archive(source, monkeypatch)
    content, over = (source / PACKED).read_bytes(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = self.server.answers.pop(0)
            if answer != "silent":
                self.send_response(500 if answer == "error" else 200)
                body = b"<html>log in</html>" if answer == "login" else content
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if answer in ("whole", "login") else body[: len(body) // 2])
            if answer in ("silent", "silent half-way"):
                over.wait(600)
            self.close_connection = True

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{PACKED}")
        monkeypatch.setenv("no_proxy", "*")
        server.content = content
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        over.set()
        server.shutdown()


@pytest.mark.parametrize(
    "answer, reason",
    {
        "half": r"the connection ended after \d[\d,]* of \d[\d,]* bytes",
        "silent": "timed out",
        "silent half-way": "timed out",
        "login": "what came is not the archive: is there a login page or a proxy",
        "error": "HTTP Error 500",
    }.items(),
)
def test_download_that_is_cut_off_is_begun_anew(answer, reason, server, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    root.mkdir()
    server.answers = [answer, "whole"]
    with monkeypatch.context() as patch:
        patch.setattr(archive, "TIMEOUT", 1 if "silent" in answer else 600)
        with pytest.raises(UserError, match=f"no CIFAR-10 in {root}, and its download failed .*{reason}"):
            data.load("cifar10", root)
    assert not list(root.iterdir())
    assert f"downloading its python archive, 170 MB, to {root}" in capsys.readouterr().out
    for name in "a", "b":
        (root / f"{PACKED}.{32 * name}.tmp").write_bytes(b"a part that a start left when it was killed")
    os.utime(root / f"{PACKED}.{32 * 'a'}.tmp", (0, 0))
    assert len(data.load("cifar10", root).train_images) == 100
    (root / f"{PACKED}.{32 * 'b'}.tmp").unlink()  # it may be one that another start is writing now
    assert [path.name for path in root.iterdir()] == [PACKED]
    assert len(data.load("cifar10", root).train_images) == 100 and not server.answers


def test_download_replaces_the_half_of_an_archive_when_it_is_whole(server, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for part in (server.content[: len(server.content) // 2], server.content[:100], b""):
        (root / PACKED).write_bytes(part)
        server.answers = ["half", "whole"]
        with pytest.raises(UserError, match=f"{root}/{PACKED} is incomplete .*, and its download failed"):
            data.load("cifar10", root)
        assert (root / PACKED).read_bytes() == part
        assert len(data.load("cifar10", root).train_images) == 100
        assert (root / PACKED).read_bytes() == server.content


def test_download_completes_a_folder_of_batches(server, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tmp_path / "source" / UNPACKED, root / UNPACKED)
    (root / UNPACKED / "data_batch_2").unlink()
    before, server.answers = files_in(root / UNPACKED), ["whole"]
    assert len(data.load("cifar10", root).train_images) == 100
    assert files_in(root / UNPACKED) == before


def test_download_goes_to_the_default_folder_which_is_made(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.answers = ["whole"]
    assert len(data.load("cifar10", "data").train_images) == 100
    assert (tmp_path / "data" / PACKED).read_bytes() == server.content


def test_photograph_without_data_is_a_cat_or_else_a_flower(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image, name = data.select_image(None, "cifar10", "data", data.CIFAR10_CLASSES)
    whole = v2.functional.center_crop(torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1), [300, 300])
    assert name == "a cat" and (image.float() - v2.functional.resize(whole, [32, 32])).abs().mean() < 1
    assert "no CIFAR-10 in data" in capsys.readouterr().out
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").touch()  # which forbids a download, but no photograph
    assert data.select_image(None, "cifar10", "data", data.CIFAR10_CLASSES)[1] == "a cat"
    monkeypatch.setattr(skimage.data, "chelsea", lambda: open("missing"))
    image, name = data.select_image(None, "cifar10", "data", data.CIFAR10_CLASSES)
    assert name == "a flower" and image.shape == (3, 32, 32)
    assert "using a photograph of a flower" in capsys.readouterr().out


def test_named_folder_without_cifar10_is_an_error_also_for_the_first_image(tmp_path):
    class_folders(tmp_path, ["kitten"])
    with pytest.raises(UserError, match="it has kitten; put"):
        data.select_image(None, "cifar10", tmp_path, data.CIFAR10_CLASSES)


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
