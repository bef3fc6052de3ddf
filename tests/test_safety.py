"""Whatever happens to a run, it is finished or can go on; and what is read runs nothing."""

import errno
import io
import os
import random
import shutil
import signal
import sys
import uuid
from pathlib import Path

import kill_and_resume
import pytest
import torch
from torch import nn

import test_filter
import train
from common import checkpoint, cli, data
from common.network import load_network
from common.run import Run, archive_previous, load_for_resume, locked
from MyResnet import sequential

SMALL = (
    "--dataset digits --recipe standard --limit 200 --size 32 --batch-size 64 --no-visdom --device cpu "
    "--precision fp32"
)
STEPS = 3  # in an epoch of it
pytestmark = pytest.mark.usefixtures("small_network")


def start(out, *flags):
    return train.main([*SMALL.split(), "--out", str(out), *flags])


def last(out):
    return torch.load(out / "last.pt", weights_only=True)


def same_end(one, other):
    one, other = last(one), last(other)
    assert one["history"]["loss"] == other["history"]["loss"]
    return all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


@pytest.fixture
def at_step(monkeypatch):
    """Makes something happen when a step, counted from 1 in this process, begins."""

    def arrange(happenings):
        count, real = iter(range(1, 1000)), data.augment

        def augment(images, batch):
            happenings.get(next(count), lambda: None)()
            return real(images, batch)

        monkeypatch.setattr(data, "augment", augment)

    return arrange


def test_killed_anywhere_it_ends_as_if_nothing_had_been(capfd):
    kill_and_resume.main(["--kills", "1", "--epochs", "1", "--seed", "3"])
    printed = capfd.readouterr().out
    assert "1 kills, 1 of them while a checkpoint was written" in printed
    assert "bit-equal to the undisturbed run: yes" in printed


def test_kill_harness_notices_a_difference(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        start(tmp_path / name, "--epochs", "1", "--seed", seed)
    a, b, c = (kill_and_resume.end_of(tmp_path / name) for name in "abc")
    assert a == b
    assert [key for key in a if a[key] != c[key]] == [
        "weights",
        "momenta",
        "loss.csv",
        "metrics.csv",
    ]


def test_it_saves_within_an_epoch_too(tmp_path, at_step):
    kept = []
    at_step({step: lambda: kept.append(len(last(tmp_path)["history"]["loss"])) for step in (1, 2, 3, 4)})
    start(tmp_path, "--epochs", "2", "--save-every", "0")
    assert kept == [0, 1, 2, 3]
    kept.clear()
    at_step({step: lambda: kept.append(len(last(tmp_path)["history"]["loss"])) for step in (1, 2, 3, 4)})
    start(tmp_path, "--epochs", "2")
    assert kept == [0, 0, 0, 3]  # after the epoch only: five minutes are not over


def test_second_interrupt_stops_at_once(tmp_path, at_step, capsys):
    start(tmp_path / "whole", "--epochs", "2")

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    at_step({5: twice})
    with pytest.raises(SystemExit) as stop:
        start(tmp_path / "cut", "--epochs", "2")
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert len(last(tmp_path / "cut")["history"]["loss"]) == STEPS
    at_step({})
    start(tmp_path / "cut", "--resume")
    assert same_end(tmp_path / "cut", tmp_path / "whole")


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while disk["full"] is true, and read-only while disk["read-only"] is."""
    state, sync, unlink = {"full": False, "read-only": False}, os.fsync, type(Path()).unlink

    def fsync(file):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(file)

    def changed(path, real, *args, **options):
        if state["read-only"]:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "open", lambda p, *args: changed(p, open, *args), raising=False)
    monkeypatch.setattr(type(Path()), "unlink", lambda p, **options: changed(p, unlink, **options))
    return state


@pytest.mark.parametrize(
    "state, reason", [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_disk_that_is_full_for_a_while(state, reason, tmp_path, at_step, disk, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    start(whole, "--epochs", "3")
    kept = []

    def full():
        disk[state] = True

    def empty():
        disk[state] = False
        kept.append(len(last(out)["history"]["loss"]))

    at_step({5: full, 8: empty})  # so the save after the second epoch fails
    capsys.readouterr()
    assert not start(out, "--epochs", "3")
    message = capsys.readouterr().err
    assert f"cannot write {out}/last.pt ({reason})" in message
    assert f"{out}/last.pt has iteration 3; training goes on" in message
    assert kept == [3] and same_end(whole, out)
    assert not list(out.glob("*.tmp"))


def test_disk_that_stays_full_ends_with_an_error_and_can_go_on(tmp_path, at_step, disk, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    start(whole, "--epochs", "2")
    at_step({5: lambda: disk.update(full=True)})
    with pytest.raises(SystemExit) as stop:
        start(out, "--epochs", "2")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: cannot write {out}/last.pt") and error.endswith(
        "last.pt has iteration 3"
    )
    disk["full"] = False
    assert not start(out, "--resume")
    assert same_end(whole, out)


def test_disk_that_is_full_from_the_start_is_said_before_training(tmp_path, at_step, disk, capsys):
    at_step({1: lambda: pytest.fail("trained")})
    disk["full"] = True
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "--epochs", "1")
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err


def test_log_on_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full())
    assert not start(tmp_path, "--epochs", "2")
    assert len(last(tmp_path)["history"]["loss"]) == 2 * STEPS


def test_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "--epochs", "9", "--lr", "1e30", "--save-every", "0")
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    kept = len(last(tmp_path)["history"]["loss"])
    assert "not finite" in message or "the loss is" in message
    assert "at learning rate" in message or "after iteration" in message
    assert (
        f"{tmp_path}/last.pt still has the run up to iteration {kept}" in message and "lower --lr" in message
    )
    assert all(tensor.isfinite().all() for tensor in last(tmp_path)["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """The last step before a save: its loss still is that of the weights before it."""
    steps, real = [], torch.optim.SGD.step

    def step(self, *args):
        real(self, *args)
        steps.append(1)
        if len(steps) == 2 * STEPS:
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "--epochs", "3")
    assert stop.value.code == 2
    assert (
        "weights are not finite after iteration 6, at learning rate 0.0556: the run stops"
        in capsys.readouterr().err
    )
    saved = last(tmp_path)
    assert len(saved["history"]["loss"]) == STEPS
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


class Malicious:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_pickles_run_nothing(tmp_path, image_folders, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("weights.pt", "run/last.pt", "data/decoded.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"model": Malicious(tmp_path / "harm")}, name)
    for script, flags in (
        (test_filter, "--weights weights.pt"),
        (train, "--evaluate --weights weights.pt"),
        (train, "--resume --out run"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main(flags.split())
        assert stop.value.code == 2
        assert (
            "holds pickled objects, which are not loaded since they can run code" in capsys.readouterr().err
        )
    for split in ("train", "test"):
        os.symlink(image_folders / split, tmp_path / "data" / split)
    assert len(data.load("cifar10", "data").train_images) == 60  # decoded again
    assert not (tmp_path / "harm").exists()
    torch.load("run/last.pt", weights_only=False)  # it would have
    assert (tmp_path / "harm").exists()


def test_earlier_run_is_whole_when_moving_it_is_cut_off(run, tmp_path, monkeypatch):
    """The checkpoint is moved last: until then the run goes on where it was."""
    moved = []
    monkeypatch.setattr(type(tmp_path), "rename", lambda path, to: moved.append(path.name))
    out = tmp_path / "run"
    out.mkdir()
    for path in run.iterdir():
        (out / path.name).touch()
    archive_previous(out)
    assert moved[-1] == "last.pt" and "weights.pt" in moved


def test_tables_alone_are_kept_too(run, tmp_path, capsys):
    for name in "metrics.csv", "loss.csv":
        shutil.copy(run / name, tmp_path)
    start(tmp_path, "--epochs", "1")
    for name in "metrics.csv", "loss.csv":
        assert (tmp_path / "earlier-1" / name).read_bytes() == (run / name).read_bytes()
    assert f"is now in {tmp_path}/earlier-1" in capsys.readouterr().out


def test_folder_of_a_run_is_its_own(tmp_path, capsys):
    with locked(tmp_path), pytest.raises(SystemExit) as stop:
        start(tmp_path, "--epochs", "1")
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert f"another run is writing to {tmp_path}: let it end" in capsys.readouterr().err
    start(tmp_path, "--epochs", "1")


def test_tables_are_whole_when_the_disk_is_full(tmp_path, monkeypatch):
    """csv.writer's output goes through `atomic_write` too."""
    start(tmp_path, "--epochs", "1")
    before = {name: (tmp_path / name).read_bytes() for name in ("loss.csv", "metrics.csv")}
    real = checkpoint.atomic_write

    def atomic_write(path):
        if path.suffix != ".pt":
            monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "full")))
        return real(path)

    monkeypatch.setattr(checkpoint, "atomic_write", atomic_write)
    with pytest.raises(SystemExit):
        start(tmp_path, "--epochs", "1", "--resume", "--save-every", "0")
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_leftovers_of_a_killed_save_go_at_the_next_start(tmp_path):
    for name in ("last.pt", "weights.pt", "loss.csv", "accuracy.png"):
        (tmp_path / f"{name}.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    own = tmp_path / ".lock", tmp_path / "loss.csv.backup.tmp"  # the user's
    for path in own:
        path.write_text("mine", encoding="utf-8")
    start(tmp_path, "--epochs", "1")
    assert list(tmp_path.glob("*.tmp")) == [own[1]]
    assert [path.read_text(encoding="utf-8") for path in own] == ["mine", "mine"]


def test_failure_that_is_no_full_disk_is_not_told_as_one(tmp_path):
    with pytest.raises(RuntimeError, match="^another$"), checkpoint.atomic_write(tmp_path / "x"):
        raise RuntimeError("another")
    assert not list(tmp_path.iterdir())


def test_finished_run_goes_on_where_its_rate_is_constant(tmp_path, capsys):
    constant = "--recipe", "assignment"
    start(tmp_path / "whole", *constant, "--epochs", "3")
    start(tmp_path / "parts", *constant, "--epochs", "2")
    start(tmp_path / "parts", "--resume", *constant, "--epochs", "3")
    assert same_end(tmp_path / "whole", tmp_path / "parts")
    assert last(tmp_path / "parts")["settings"] | {"name": ""} == last(tmp_path / "whole")["settings"] | {
        "name": ""
    }
    start(tmp_path / "other", "--recipe", "standard", "--epochs", "2")
    for out, epochs in (("parts", "2"), ("other", "3"), ("other", "1")):
        before = (tmp_path / out / "last.pt").read_bytes()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(tmp_path / out, "--resume", "--epochs", epochs, *(constant if out == "parts" else ()))
        assert stop.value.code == 2 and before == (tmp_path / out / "last.pt").read_bytes()
        error = capsys.readouterr().err
        assert f"not {epochs}: " in error and f"--init {tmp_path / out}/weights.pt" in error


def mutated(content, random):
    """The bytes with some of them changed, left out, put in or copied elsewhere; perhaps cut."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8, 40))):
        i, j = random.randrange(len(content)), random.randrange(len(content))
        length, kind = random.choice((1, 4, 100)), random.randrange(4)
        if kind == 0:
            content[i] ^= 1 << random.randrange(8)
        elif kind == 1 and len(content) > 200:
            del content[i : i + length]
        elif kind == 2:
            content[i:i] = random.randbytes(length)
        else:
            content[i : i + length] = content[j : j + length]
    return bytes(content if random.random() < 0.9 else content[: random.randrange(len(content))])


@pytest.fixture
def tiny(monkeypatch):
    """A network so small that its file has a few kilobytes, and what weights.pt holds of it."""

    def network(classes):
        layers = dict(conv1=sequential(conv=nn.Conv2d(3, 4, 3)), pool=nn.AdaptiveAvgPool2d(1))
        return sequential(**layers, flatten=nn.Flatten(), fc=nn.Linear(4, classes))

    for module in "network", "weights":
        monkeypatch.setattr(f"common.{module}.ResNet18", network)
    content = dict(model=network(2).state_dict(), classes=["cat", "dog"], source="a test", settings={})
    return content | dict(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), size=32, accuracy=0.5)


def opens_or_ends_in_one_line(read, capsys):
    """Whether `read()` opens; if it does not, it must end as a script does for an error of its user."""
    capsys.readouterr()
    try:
        cli.command(lambda argv: read())([])
        return True
    except SystemExit as stop:
        printed = capsys.readouterr().err
        assert stop.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
        assert len(printed) <= 301
        return False


def test_damaged_weights_open_unchanged_or_end_in_one_line(tiny, tmp_path, capsys):
    chance, opened, path = random.Random(0), 0, tmp_path / "weights.pt"
    for zipped in True, False:
        torch.save(tiny, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(300):
            path.write_bytes(mutated(whole, chance))
            networks = []
            if opens_or_ends_in_one_line(
                lambda networks=networks: networks.append(load_network(path, "cifar10", torch.device("cpu"))),
                capsys,
            ):
                opened += 1
                if zipped:
                    state = networks[0].model.state_dict()
                    assert all(torch.equal(state[name], tiny["model"][name]) for name in state)
    assert 10 < opened < 300


def test_strange_weights_open_or_end_in_one_line(tiny, tmp_path, capsys):
    strange = [None, True, -1, 10**30, float("nan"), "漢" * 5000, b"x", [], {}, (1,), [[1]], [1, 2], {1: 2}]
    strange += [torch.zeros(0), torch.zeros(2, device="meta"), torch.tensor([float("inf")]), ("a",) * 3]
    strange += [torch.zeros(2, 2).to_sparse(), {"module.": 1}]
    places = [(tiny, key) for key in tiny] + [(tiny["model"], key) for key in tiny["model"]]
    path, opened = tmp_path / "weights.pt", []
    for value in strange:
        for holder, key in places:
            before, holder[key] = holder[key], value
            torch.save(tiny, path)
            holder[key] = before
            if opens_or_ends_in_one_line(lambda: load_network(path, "", torch.device("cpu")), capsys):
                opened.append((key, value))
    assert [key for key, _ in opened] == ["source", "settings", "accuracy"] * len(strange), opened


def test_damaged_checkpoint_of_a_run_opens_or_ends_in_one_line(tmp_path, capsys):
    start(tmp_path, "--epochs", "1")
    args, chance = train.parse([*SMALL.split(), "--out", str(tmp_path)]), random.Random(0)
    path, dataset = tmp_path / "last.pt", train.load_data(args, dict(holdout=None, limit=200), "cpu")
    whole = path.read_bytes()

    def resume():
        saved = load_for_resume(args)
        Run(saved["settings"], dataset, tmp_path, torch.device("cpu"), saved)

    assert opens_or_ends_in_one_line(resume, capsys)
    for _ in range(200):
        path.write_bytes(mutated(whole, chance))
        opens_or_ends_in_one_line(resume, capsys)


def test_wrapped_networks_weights_open(run, tmp_path):
    saved = checkpoint.load(run / "weights.pt")
    for prefix in "module.", "_orig_mod.module.":
        wrapped = {prefix + name: tensor for name, tensor in saved["model"].items()}
        torch.save(saved | dict(model=wrapped), tmp_path / "weights.pt")
        state = load_network(tmp_path / "weights.pt", "digits", torch.device("cpu")).model.state_dict()
        assert all(torch.equal(state[name], tensor.float()) for name, tensor in saved["model"].items())
