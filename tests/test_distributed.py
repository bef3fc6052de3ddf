"""Many processes: together they do what one does, and none of them hangs when another dies."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_gradient
import pytest
import torch

import train
from common import distributed
from common.cli import UserError

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds, for what must end
SMALL = "--dataset digits --limit 90 --size 32 --batch-size 30 --no-visdom --device cpu --precision fp32"


def start(*command, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


def torchrun(processes, script, *flags):
    options = "--standalone", "--nproc-per-node", processes
    return start("-m", "torch.distributed.run", *options, script, *flags)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def assert_same(one, other):
    for mine, theirs in zip(one[0], other[0]):
        assert mine.dtype == torch.float64
        assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    torch.testing.assert_close(one[1], other[1])


def test_gradient_in_parts_is_that_of_the_batch(double):
    assert_same(
        distributed_gradient.gradient(micro_batches=3), distributed_gradient.gradient(micro_batches=1)
    )


def test_gradient_of_many_in_parts_is_that_of_one(double, free_port, tmp_path):
    command = distributed_gradient.__file__, tmp_path / "gradient.pt", 2  # 14 images: 5 + 5 + 4, in two parts
    environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), WORLD_SIZE="3")  # as torchrun's
    for process in [start(*command, RANK=str(rank), **environment) for rank in range(3)]:
        error = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 0, error
    *results, logits = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert_same(results, distributed_gradient.gradient(micro_batches=1))
    assert logits.tolist() == [0, 1, 2, 3, 4, 5, 6]


def processes_below(pid):
    """{rank: process} of what torchrun started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split():
        variables = Path(f"/proc/{child}/environ").read_text(encoding="utf-8").split("\0")
        found |= {int(v.partition("=")[2]): int(child) for v in variables if v.startswith("RANK=")}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_process_that_dies_ends_the_others_and_the_run_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*SMALL.split(), "--epochs", "30", "--save-every", "0", "--out", out]
    run = torchrun(2, ROOT / "train.py", *flags)
    while not (out / "weights.pt").exists() and run.poll() is None:
        time.sleep(0.05)
    os.kill(processes_below(run.pid)[1], signal.SIGKILL)
    error = run.communicate(timeout=LIMIT)[1]  # it ends
    assert run.returncode
    assert re.search(r"rank +: 1 ", error) and "exitcode  : -9" in error  # torchrun names it
    message = next(line for line in error.splitlines() if "rank 0: error: " in line)
    saved = torch.load(out / "last.pt", weights_only=True)  # whole
    done = len(saved["history"]["loss"])
    assert f"{out}/last.pt has iteration {done}: --resume goes on" in message

    saved["settings"]["epochs"] = epochs = done // 3 + 2  # not all thirty
    saved["settings"]["sizes"] = [32] * epochs
    torch.save(saved, out / "last.pt")
    run = torchrun(2, ROOT / "train.py", *SMALL.split(), "--resume", "--out", out)
    printed, error = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, error
    with open(out / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert printed.count("test set, 360 images") == 1  # only the first process prints
    train.main(f"--evaluate --dataset digits --precision fp32 --weights {out}/weights.pt --out {out}".split())
    assert "test set, 360 images" in (evaluated := capsys.readouterr().out)
    accuracy = float(evaluated.split("accuracy ")[1].split("%")[0])
    assert accuracy == pytest.approx(100 * float(rows[-1]["test_accuracy"]), abs=0.3)  # weights are rounded


def test_processes_do_not_share_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="cannot share an Apple GPU: .*--device cpu"):
        with distributed.process_group(torch.device("mps")):
            pass


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(2**50, dtype=torch.uint8),  # a petabyte, from the system
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")),
    ],
)
@pytest.mark.parametrize("flags, parts", [("", 2), ("--accumulate 4", 8)])
def test_memory_that_is_refused_is_one_line(fail, flags, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "backward", lambda *args: next(iter([fail()])))
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL.split(), *flags.split(), "--epochs", "1", "--out", str(tmp_path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"not enough memory for this batch: --resume --accumulate {parts} takes it" in message
    assert message.endswith(f"{tmp_path}/last.pt has iteration 0")
