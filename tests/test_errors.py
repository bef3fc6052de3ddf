"""Wrong input: one line on stderr that names the thing and the way out, status 2, and no file touched."""

import os
import pickle
import shutil
import socket

import kill_and_resume
import numpy as np
import pytest
import torch
from PIL import Image

import MyResnet
import Myvisdom
import test_activations
import test_featuremaps
import test_filter
import test_recon_conv1
import test_recon_conv5
import train
from common.data import CIFAR10_CLASSES
from common.page import client
from extras import gradcam, maximize, reconstruct, sanity_check, top_pictures
from MyResnet import ResNet18


@pytest.fixture(scope="module")
def things(run, image_folders, tmp_path_factory):
    """A folder with good and bad things in it."""
    tmp_path = tmp_path_factory.mktemp("things")
    before = os.getcwd()
    os.chdir(tmp_path)
    shutil.copytree(run, "run")
    for name in ("good", "no_cat", "empty_dog", "broken"):
        shutil.copytree(image_folders, name, ignore=shutil.ignore_patterns("decoded.pt"))
    shutil.rmtree("no_cat/test/cat")
    for path in (tmp_path / "empty_dog/train/dog").iterdir():
        path.unlink()
    image = tmp_path / "broken/train/frog/0002.png"
    image.write_bytes(image.read_bytes()[:200])
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/cifar-10-python.tar.gz").write_bytes(b"wrong")
    (tmp_path / "text.pt").write_text("not weights", encoding="utf-8")
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2], "list.pt")
    saved = torch.load("run/weights.pt", weights_only=True)
    torch.save(saved | {"model": ResNet18(5).state_dict()}, "five.pt")
    torch.save(saved | {"model": {}}, "nothing.pt")
    renamed = {f"{name}.{'long' * 20}": tensor for name, tensor in saved["model"].items()}
    torch.save(saved | {"model": renamed}, "renamed.pt")
    torch.save(ResNet18(), "object.pt")
    torch.save(saved | {"accuracy": np.float64(0.5)}, "numpy.pt")
    torch.save(ResNet18(), "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(saved))
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save("script.pt")
    content = bytearray((tmp_path / "run/weights.pt").read_bytes())
    content[len(content) // 2] ^= 1  # in the weights, where torch alone would not see it
    (tmp_path / "bit.pt").write_bytes(content)
    torch.save(saved | {"classes": CIFAR10_CLASSES}, "cifar.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    broken = {name: value * float("nan") for name, value in saved["model"].items() if name == "fc.weight"}
    torch.save(saved | {"model": saved["model"] | broken}, "nan.pt")
    huge = {name: value.float() * 1e30 for name, value in saved["model"].items() if value.ndim == 4}
    torch.save(saved | {"model": saved["model"] | huge}, "huge.pt")
    for name, value in dict(mean=(0.5,), std=(1.0, 1.0, 0.0), size=10**7).items():
        torch.save(saved | {name: value}, f"{name}.pt")
    for path in ("cut", "weights_only", "other", "folder/last.pt", "labels/train/kitten"):
        (tmp_path / path).mkdir(parents=True)
    half = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "cut/last.pt").write_bytes(half[: len(half) // 2])
    half = (tmp_path / "run/weights.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(half[: len(half) // 2])
    torch.save(saved, "weights_only/last.pt")
    last = torch.load("run/last.pt", weights_only=True)
    torch.save(last | {"model": ResNet18(5).state_dict()}, "other/last.pt")
    for name in ("settings", "history"):
        (tmp_path / f"no_{name}").mkdir()
        torch.save(last | {name: {}}, f"no_{name}/last.pt")
    (tmp_path / "empty.png").touch()
    Image.effect_noise((64, 64), 50).save("cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    Image.new("1", (20_000, 20_000)).save("bomb.png")
    (tmp_path / "text.jpg").write_text("not an image", encoding="utf-8")
    Image.new("RGB", (40, 40)).save("fine.png")
    (tmp_path / "file").touch()
    os.chdir(before)
    return tmp_path


@pytest.fixture
def place(things, monkeypatch):
    """That folder, in which the script is run: none of these runs may change it."""
    monkeypatch.chdir(things)
    return things


TRAIN = "--dataset digits --epochs 1 --limit 64 --size 32 --no-visdom"
DIGITS = "--weights run/weights.pt --dataset digits"
WRONG = [
    (train, "--data nowhere", "no folder nowhere: name the one that has CIFAR-10 with --data"),
    (train, "--data no_cat", "no_cat/test has no class folder cat: each of the ten needs its own"),
    (train, "--data empty_dog", "empty_dog/train/dog has no images"),
    (train, "--data broken", "broken/train/frog/0002.png cannot be read as an image"),
    (train, "--data archive", "archive/cifar-10-python.tar.gz is damaged, or not CIFAR-10's"),
    (train, "--dataset mnist", "--dataset"),
    (train, "--recipe slow", "--recipe"),
    (train, "--size 31", "--size: 31 is not from 32"),
    (train, "--size big", "--size: invalid whole number value: 'big'"),
    (train, "--lr fast", "--lr: invalid number value: 'fast'"),
    (train, "--lr nan", "--lr: nan is not 0 or more"),
    (train, "--lr inf", "--lr: inf is not"),
    (train, "--lr -0.1", "--lr: -0.1 is not"),
    (train, "--epochs 0", "--epochs: 0 is not from 1 to 100000"),
    (train, "--batch-size 1", "--batch-size: 1 is not 2 or more"),
    (train, "--limit 1", "--limit"),
    (train, "--holdout 0", "--holdout"),
    (train, "--precision fp8", "--precision"),
    (train, "--seed -1", "--seed"),
    (train, "--device abacus", "no device 'abacus' on this machine: --device takes "),
    (train, "--port 0", "--port"),
    (train, "--what", "--what"),
    (train, f"{TRAIN} --holdout 1437", "--holdout 1437 leaves no images"),
    (train, f"{TRAIN} --out file", "cannot make the folder file"),
    (train, f"{TRAIN} --out file/below", "cannot make the folder file/below"),
    (train, f"{TRAIN} --weights run/weights.pt", "--weights goes with --evaluate"),
    (train, f"{TRAIN} --mean 0.5 0.5 0.5", "--mean goes with --evaluate"),
    (train, "--resume --out nowhere", "no run to resume in nowhere"),
    (train, "--resume --evaluate", "--resume, --evaluate and --init exclude each other"),
    (train, "--resume --out run --epochs 9 --dataset digits", "from its weights with --init run/weights.pt"),
    (train, "--evaluate --weights nowhere.pt", "no weights in nowhere.pt"),
    (train, "--evaluate --weights run/weights.pt --data good", "other classes than those of cifar10: --data"),
    (test_filter, "--dataset digits", "runs/digits/weights.pt: python train.py --dataset digits makes them"),
    (test_filter, "--weights run", "run is a folder: --weights takes a file, such as run/weights.pt"),
    (test_filter, "--clas cat", "unrecognized arguments: --clas cat"),
    (test_activations, "--weights huge.pt --image fine.png", "the network's logits are not finite"),
    (train, "--evaluate --limit 3", "--limit is for training, not for --evaluate"),
    (Myvisdom, "--weights run/weights.pt", "--image and --weights go with --explore"),
    (test_filter, "--weights text.pt", "text.pt is not a checkpoint, or is damaged"),
    (test_filter, "--weights empty.pt", "empty.pt is not a checkpoint, or is damaged"),
    (train, "--resume --out run", "the run in run has --dataset digits, not cifar10"),
    (train, "--resume --out run --dataset digits --size 64", "the run in run has --size 32, not 64"),
    (train, "--resume --out run --dataset digits --holdout 9", "has no --holdout, not 9: resume it without"),
    (test_filter, "--weights run/weights.pt --std 0 1 1", "--std: 0 is not from 0.001 to 1"),
    (test_filter, "--weights run/weights.pt --mean 123.7 116.3 103.5", "--mean: 123.7 is not from 0 to 1"),
    (train, "--init nowhere.pt --dataset digits", "python train.py makes them, --init names"),
    (test_filter, "--weights tensor.pt", "tensor.pt has no state dict of a network"),
    (test_activations, "--weights cifar.pt --data nowhere", "no folder nowhere"),
    (test_activations, "--weights run/weights.pt --data good", "are for other classes than those of cifar10"),
    (test_filter, "--weights list.pt", "list.pt has no state dict of a network"),
    (test_filter, "--weights five.pt", "five.pt knows 5 classes, there are 10 names of classes"),
    (test_filter, "--weights nothing.pt", "nothing.pt has no state dict of a network"),
    (test_filter, "--weights renamed.pt", "name others with --weights"),
    (test_filter, "--weights object.pt", "object.pt holds pickled objects, which are not loaded since they"),
    (test_filter, "--weights legacy.pt", "legacy.pt holds pickled objects"),
    (test_filter, "--weights script.pt", "script.pt holds pickled objects"),
    (test_filter, "--weights pickle.pt", "save a state dict instead, torch.save(model.state_dict(), …)"),
    (train, "--evaluate --weights numpy.pt", "numpy.pt holds pickled objects"),
    (test_filter, "--weights bit.pt", "bit.pt is not a checkpoint, or is damaged (BadZipFile)"),
    (test_filter, f"--weights {'folder/' * 300}w.pt", "python train.py makes them, --weights names"),
    (test_filter, f"--weight{'s' * 500}", "(--help lists the flags)"),
    (test_filter, "--weights run/weights.pt --out file", "cannot make the folder file"),
    (test_featuremaps, "--weights run/weights.pt --image no.png", "no image no.png"),
    (test_featuremaps, "--weights run/weights.pt --image text.jpg", "text.jpg cannot be read as an image"),
    (test_activations, "--weights run/weights.pt --image run", "run cannot be read as an image"),
    (test_activations, "--weights run/weights.pt --dataset digits --image 360", "--image takes 0 to 359"),
    (test_activations, "--weights cifar.pt --data good --image 30", "--image takes 0 to 29"),
    (test_recon_conv1, "--weights run/weights.pt --image fine.png --map 64", "--map takes 0 to 63"),
    (test_recon_conv5, "--weights run/weights.pt --image fine.png --map 512", "--map takes 0 to 511"),
    (test_recon_conv5, "--weights run/weights.pt --image fine.png --map -1", "--map"),
    (test_recon_conv5, "--weights run/weights.pt --method magic", "--method"),
    (train, f"{TRAIN} --save-every -1", "--save-every: -1 is not 0 or more"),
    (train, f"{TRAIN} --save-every nan", "--save-every: nan is not 0 or more"),
    (train, "--resume --out cut --dataset digits", "cut/last.pt is not a checkpoint, or is damaged"),
    (train, "--resume --out weights_only", "weights_only/last.pt is no checkpoint of a run"),
    (train, "--resume --out other --dataset digits", "other/last.pt is of another network, or damaged"),
    (train, "--resume --out folder", "no run to resume in folder"),
    (train, "--data labels", "no test/ in labels: it has train, not"),
    (train, "--data file", "file is damaged, or not CIFAR-10's python archive"),
    (train, f"{TRAIN} --out /dev/null/run", "cannot make the folder /dev/null/run"),
    (train, "--evaluate --weights cut.pt", "cut.pt is not a checkpoint, or is damaged"),
    (test_filter, "--weights cut.pt", "cut.pt is not a checkpoint, or is damaged"),
    (test_featuremaps, "--weights run/weights.pt --image empty.png", "empty.png cannot be read as an image"),
    (test_featuremaps, "--weights run/weights.pt --image cut.png", "cut.png cannot be read as an image"),
    (test_featuremaps, "--weights run/weights.pt --image bomb.png", "bomb.png cannot be read as an image"),
    (test_featuremaps, "--weights run/weights.pt --image 0 --data nowhere", "no folder nowhere"),
    (test_activations, "--weights run/weights.pt --dataset digits --image ²", "no image ²"),
    (test_filter, "--weights nan.pt", "nan.pt has weights that are not finite"),
    (test_filter, "--weights mean.pt", "mean.pt was not written by train.py"),
    (test_filter, "--weights std.pt", "std.pt was not written by train.py"),
    (train, "--evaluate --dataset digits --weights size.pt", "size.pt was not written by train.py"),
    (train, "--resume --dataset digits --out no_settings", "no_settings/last.pt is no checkpoint of a run"),
    (train, "--resume --dataset digits --out no_history", "no_history/last.pt is no checkpoint of a run"),
    (train, f"{TRAIN} --out run --accumulate 33", "66 images a batch are the least for 1 process and"),
    (train, f"{TRAIN} --accumulate 0", "--accumulate: 0 is not 1 or more"),
    (train, f"{TRAIN} --sync-bn", "--sync-bn needs torchrun and CUDA"),
    (train, "--epochs 1000000000000", "--epochs: 1000000000000 is not from 1 to 100000"),
    (test_activations, f"{DIGITS} --image {'9' * 5000}", "cannot be read as an image"),
    (MyResnet, "--what", "unrecognized arguments: --what"),
    (kill_and_resume, "--kills 0", "--kills: 0 is not 1 or more"),
    (reconstruct, f"{DIGITS} --map {'9' * 5000}", "--map takes a number"),
    (reconstruct, f"{DIGITS} --layer fc", "no layer 'fc' with maps: --layer takes conv1, conv2_x"),
    (reconstruct, f"{DIGITS} --map best", "no maps 'best': --map takes a number, several as 7,43"),
    (reconstruct, f"{DIGITS} --map 512", "--map takes 0 to 511"),
    (top_pictures, "--weights cifar.pt --data nowhere", "no folder nowhere"),
    (top_pictures, f"{DIGITS} --layer conv1 --map 64", "--map takes 0 to 63"),
    (maximize, f"--seed {10**20}", f"--seed: {10**20} is not from 0 to {2**31}"),
    (maximize, "--weights run/weights.pt --data good", "are for other classes than those of cifar10"),
    (maximize, f"{DIGITS} --map strongest:3", "--map takes a number here, or several as 7,43"),
    (top_pictures, f"{DIGITS} --map strongest:3", "--map takes a number here, or several as 7,43"),
    (gradcam, f"{DIGITS} --class cat", "no class 'cat': --class takes 0, 1"),
    (sanity_check, f"{DIGITS} --layer top", "--layer"),
    (Myvisdom, "--port 70000", "--port"),
    (Myvisdom, "--explore --weights nowhere.pt", "no weights in nowhere.pt"),
]  # fmt: skip


def files(place):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in place.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "script, flags, message", WRONG, ids=lambda value: getattr(value, "__name__", str(value))[:60]
)
def test_wrong_input_gets_one_line(script, flags, message, place, capsys):
    before = files(place)
    with pytest.raises(SystemExit) as stop:
        script.main(flags.split())
    assert stop.value.code == 2
    printed = capsys.readouterr().err.split("\r")[-1].strip()
    assert printed.startswith("error: ") and "\n" not in printed and len(printed) <= 300
    assert message in printed
    assert "Traceback" not in printed
    after = files(place)
    assert {p: s for p, s in after.items() if p in before} == before
    assert {p.name for p in after.keys() - before.keys()} <= {"decoded.pt"}


def test_the_image_to_look_at_is_not_overwritten(place, capsys):
    shutil.copytree(place / "run", place / "own")
    shutil.copy(place / "fine.png", place / "own" / "image.png")
    flags = f"{DIGITS} --image own/image.png --out own"
    message = "own/image.png is the image that --image names, and would be overwritten: name another --out"
    test_wrong_input_gets_one_line(test_featuremaps, flags, message, place, capsys)


def test_memory_refused_to_a_figure_is_one_line(place, monkeypatch, capsys):
    monkeypatch.setattr(
        test_filter, "network_from_flags", lambda *args: torch.empty(2**50, dtype=torch.uint8)
    )
    with pytest.raises(SystemExit) as stop:
        test_filter.main(["--weights", "run/weights.pt"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: not enough memory for this")


def test_busy_port_is_said_before_training(place, monkeypatch, capsys):
    monkeypatch.setattr(client, "TIMEOUT", 1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            train.main(["--dataset", "digits", "--out", "new", "--port", str(port)])
    assert stop.value.code == 2
    assert f"error: port {port} is used by another program" in capsys.readouterr().err
    assert not (place / "new").exists()
