"""Kills a small training run with SIGKILL at random moments, resumes it each time, and compares where it ends
with a run that nothing disturbed: python -m tests.kill_and_resume"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # for `python tests/kill_and_resume.py`

from common import checkpoint, cli

RUN = (
    "--dataset digits --recipe standard --limit 64 --batch-size 16 --size 32 --precision fp32 --seed 3 "
    "--save-every 0 --no-visdom --device cpu"
)


def start(out, epochs, *flags):
    train = Path(__file__).parent.parent / "train.py"
    flags = [*RUN.split(), "--epochs", str(epochs), "--out", str(out), *flags]
    return subprocess.Popen([sys.executable, train, *flags], stdout=subprocess.DEVNULL)


def kill_at_random(process, out, random):
    """Kills the process: one in five while it starts, two in five while it writes a checkpoint, the rest
    within two seconds of its first save. Returns whether it was writing one; None if it had ended before."""
    leftovers = set(out.glob("*.pt.*.tmp"))
    before = (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
    aim = random.random()
    if aim < 0.2:
        time.sleep(random.uniform(0, 4))
    else:
        while process.poll() is None:
            if (out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        if aim < 0.6:
            while process.poll() is None and not set(out.glob("*.pt.*.tmp")) - leftovers:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.1))
        else:
            time.sleep(random.uniform(0, 2))
    if process.poll() is not None:
        if process.returncode:
            raise cli.UserError(f"the run failed, with status {process.returncode}")
        return None
    process.kill()
    process.wait()
    return bool(set(out.glob("*.pt.*.tmp")) - leftovers)


def end_of(out):
    """What a run ended with, by name, tensors as bytes; tables as rows, without an epoch's seconds."""
    saved = checkpoint.load(out / "last.pt")
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    momenta += [state["momentum"] for state in saved.get("muon", {"state": {}})["state"].values()]
    epochs = [row.rsplit(",", 1)[0] for row in (out / "metrics.csv").read_text(encoding="utf-8").splitlines()]
    return {
        "weights": [tensor.numpy().tobytes() for tensor in saved["model"].values()],
        "momenta": [tensor.numpy().tobytes() for tensor in momenta],
        "loss.csv": (out / "loss.csv").read_text(encoding="utf-8"),
        "metrics.csv": epochs,
        "files": sorted(path.name for path in out.iterdir()),
    }


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--kills", type=cli.number(int, 1), default=30, metavar="N", help="number of kills (default: 30)")
    add("--epochs", type=cli.number(int, 1), default=40, metavar="N", help="epochs of 4 steps (default: 40)")
    add("--seed", type=cli.number(int, 0), default=0, metavar="N", help="seed of the moments (default: 0)")
    args = parser.parse_args(argv)
    moments, began = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        if start(whole, args.epochs).wait():
            raise cli.UserError("the run that nothing disturbed failed")
        kills = writing = resumes = 0
        while kills < args.kills:
            resume = ["--resume"] if (killed / "last.pt").exists() else []
            process = start(killed, args.epochs, *resume)
            was_writing = kill_at_random(process, killed, moments)
            if was_writing is None:
                raise cli.UserError(f"the run was over after {kills} kills: take more --epochs")
            kills, writing, resumes = kills + 1, writing + was_writing, resumes + len(resume)
            if (killed / "last.pt").exists():
                iteration = len(checkpoint.load(killed / "last.pt")["history"]["loss"])  # it is whole
                print(f"kill {kills}: iteration {iteration}{', while saving' * was_writing}", flush=True)
        if start(killed, args.epochs, "--resume").wait():
            raise cli.UserError("the last resume failed")
        resumes += 1
        end, expected = end_of(killed), end_of(whole)
    different = [name for name in expected if end[name] != expected[name]]
    print(
        f"{kills} kills, {writing} of them while a checkpoint was written, {resumes} resumes, "
        f"{time.time() - began:.0f} s; bit-equal to the undisturbed run: {'no' if different else 'yes'}"
    )
    if different:
        raise cli.UserError(f"these differ: {', '.join(different)}")


if __name__ == "__main__":
    main()
