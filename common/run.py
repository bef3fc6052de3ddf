"""A training run on disk: what it consists of, saving it, going on with it, keeping an earlier one.

Its files are last.pt (all that it takes to go on), weights.pt (all that it takes to look inside),
loss.csv, metrics.csv and their curves."""

import contextlib
import csv
import io
import itertools
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from common import checkpoint, cli, figures, ranks
from common.cli import UserError
from MyResnet import ResNet18

FILES = "weights.pt metrics.csv loss.csv loss.png accuracy.png last.pt".split()


class Run:
    """A run as far as it is: `model`, `optimizer`, `scaler`, and in `history` all that happened, per
    iteration and per epoch (the rows of metrics.csv). The history says how far the run is; together with
    the seed it says what comes next, so no other state needs to be saved.

    `out` is its folder, `saved` a checkpoint to go on from."""

    def __init__(self, settings, dataset, out, device, saved=None):
        self.settings, self.out = settings, out
        self.about = dict(classes=list(dataset.classes), source=dataset.source, settings=settings)
        self.steps = max(1, len(dataset.train_images) // settings["batch_size"])  # in an epoch
        torch.manual_seed(settings["seed"])
        self.model = ResNet18(len(dataset.classes)).to(device, memory_format=cli.memory_format(device))
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]  # of batch norms, and fc's bias
        groups = [dict(params=weights, weight_decay=settings["weight_decay"]), dict(params=others)]
        options = {key: settings[key] for key in ("lr", "momentum", "nesterov")}
        self.optimizer = torch.optim.SGD(groups, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
        self.history = dict(loss=[], accuracy=[], rate=[], clock=[], epochs=[], seconds=0.0)
        self.kept = 0  # iterations that last.pt holds
        if saved:
            try:
                self.model.load_state_dict(saved["model"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.scaler.load_state_dict(saved["scaler"])
                self.history |= saved["history"]
                self.kept = self.iteration
            except (KeyError, RuntimeError, TypeError, ValueError, AttributeError):
                raise UserError(
                    f"{out / 'last.pt'} is of another network, or damaged: start anew in another --out"
                )
        self.saved_at = time.time()  # history["seconds"], those of the unfinished epoch, are up to then
        self.mark = time.perf_counter()  # history["clock"], the seconds of training, is up to then
        self.unsaved = False  # whether the latest save failed

    @property
    def iteration(self):
        """How many are done."""
        return len(self.history["loss"])

    def record(self, loss, accuracy, rate):
        """Adds an iteration to the history. Raises `UserError` if its loss is not finite."""
        self._check(
            math.isfinite(loss), f"the loss is {loss} in iteration {self.iteration + 1}, at rate {rate:.3g}"
        )
        now, clock = time.perf_counter(), self.history["clock"]
        values = dict(rate=rate, accuracy=accuracy, clock=(clock[-1] if clock else 0.0) + now - self.mark)
        for key, value in (values | dict(loss=loss)).items():
            self.history[key].append(value)  # the loss last: the live page counts by it
        self.mark = now

    def _check(self, finite, what):
        if not finite:
            raise UserError(
                f"{what}: the run stops; {self.out / 'last.pt'} has iteration {self.kept}, from before: "
                "start another with a lower --lr, or with --precision fp32"
            )

    def end_epoch(self, size, **measured):
        """Adds an epoch, with what was measured after it, to the history; returns its row."""
        row = dict(
            epoch=len(self.history["epochs"]) + 1,
            iteration=self.iteration,
            size=size,
            train_loss=sum(self.history["loss"][-self.steps :]) / self.steps,
            train_accuracy=sum(self.history["accuracy"][-self.steps :]) / self.steps,
            **measured,
            seconds=round(self.history["seconds"] + time.time() - self.saved_at, 1),
        )
        self.history["epochs"].append(row)
        self.history["seconds"], self.saved_at = 0.0, time.time()
        return row

    def save(self, curves=False, insist=False):
        """Writes all files, but `curves` only on demand. If that fails it says so and the run can go on, or
        if it must `insist` it raises `UserError`, as it does before weights that are not finite."""
        now, history, sizes = time.time(), self.history, self.settings["sizes"]
        history["seconds"] += now - self.saved_at
        self.saved_at = now
        state = self.model.state_dict()
        halves = {name: t.half() if t.ndim > 1 else t for name, t in state.items()}  # not batch norms
        finite = all(bool(tensor.isfinite().all()) for tensor in halves.values())
        rate = f", at rate {history['rate'][-1]:.3g}" if history["rate"] else ""
        self._check(finite, f"the weights are not finite after iteration {self.iteration}{rate}")
        if ranks.RANK:
            return  # the first process writes
        network = self.about | dict(
            model=state,
            mean=self.settings["mean"],
            std=self.settings["std"],
            size=sizes[max(0, self.iteration - 1) // self.steps],  # the last it was trained at
            accuracy=history["epochs"][-1]["test_accuracy"] if history["epochs"] else None,
        )
        progress = dict(
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), history=history
        )
        try:
            checkpoint.save(network | progress, self.out / "last.pt")
            self.kept = self.iteration
            if self.iteration:
                checkpoint.save(network | dict(model=halves), self.out / "weights.pt")
            self._write_tables()
            if curves:
                self._draw_curves()
            self.unsaved = False
        except (UserError, OSError) as error:
            self.unsaved = True
            message = f"{error}; {self.out / 'last.pt'} has iteration {self.kept}"
            if insist:
                raise UserError(message)
            tqdm.write(f"{message}; training goes on, and the next save tries again", file=sys.stderr)

    @contextlib.contextmanager
    def failures_explained(self, parts):
        """Makes memory that is refused to a batch in so many `parts`, and another process that is gone, a
        `UserError`."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            kept = f"{self.out / 'last.pt'} has iteration {self.kept}"
            if cli.out_of_memory(error):
                way_out = f"--resume --accumulate {2 * parts} takes it in {2 * parts} parts"
                raise UserError(f"not enough memory for this batch: {way_out}; {kept}")
            if ranks.lost(error):
                raise UserError(f"{ranks.LOST}; {kept}: --resume goes on")
            raise

    def _write_tables(self):
        history, epochs = self.history, self.history["epochs"]
        columns = history["loss"], history["accuracy"], history["rate"]
        steps = ([i, *(f"{value:.6g}" for value in row)] for i, row in enumerate(zip(*columns), 1))
        self._write_table("loss.csv", [["iteration", "loss", "accuracy", "rate"], *steps])
        if epochs:
            self._write_table("metrics.csv", [epochs[0].keys(), *(row.values() for row in epochs)])

    def _write_table(self, name, rows):
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        with checkpoint.replacing(self.out / name) as file:
            file.write(text.getvalue().encode())

    def _draw_curves(self):
        """Figures 6.1 and 6.2."""
        title = f"ResNet-18, {self.settings['dataset']}, recipe {self.settings['recipe']}"
        curves = {"loss.png": figures.loss_curve(self.history["loss"], title)}
        if epochs := self.history["epochs"]:
            curves["accuracy.png"] = figures.accuracy_curve(epochs, self.settings["sizes"][-1], title)
        for name, figure in curves.items():
            with checkpoint.replacing(self.out / name) as file:
                figure.savefig(file, format="png", dpi=110)


@contextlib.contextmanager
def alone(out):
    """Within it no other run can write to the folder `out`, where the system has such locks. Removes what a
    run left that was killed while it saved. Raises `UserError` if another one is writing."""
    folder = os.open(out, os.O_RDONLY) if os.name == "posix" else None
    try:
        if folder is not None:
            import fcntl

            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing to {out}: let it end, or choose another --out")
            except OSError:  # a file system without locks
                pass
        for name in FILES:
            for leftover in out.glob(f"{name}.*.tmp"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def set_aside(out):
    """Moves a run that is in the folder `out` already to a new folder in it: nothing is overwritten."""
    old = [out / name for name in FILES if (out / name).exists()]  # last.pt last: till then it can go on
    if out / "last.pt" in old or out / "weights.pt" in old:
        aside = next(out / f"earlier-{n}" for n in itertools.count(1) if not (out / f"earlier-{n}").exists())
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"the run that was in {out} is now in {aside}")


def resumed(args):
    """The checkpoint of the run in --out. Raises `UserError` where there is none, or where the flags
    ask for another run than that."""
    path = args.out / "last.pt"
    if not path.is_file():
        raise UserError(f"no run to resume in {args.out}: --out names the folder of one")
    saved = checkpoint.load(path)
    flags = "dataset recipe epochs batch_size size lr seed precision limit holdout".split()
    try:
        settings = {flag: saved["settings"]["sizes" if flag == "size" else flag] for flag in flags}
        saved["optimizer"], saved["history"]["loss"]
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path} is no checkpoint of a run: --out names the folder of one")
    for flag, was in settings.items():
        asked = getattr(args, flag)
        if flag == "size":
            was = was[0] if len(set(was)) == 1 else "by its recipe"
        if asked not in (None, "auto", was):
            raise UserError(
                f"the run in {args.out} has --{flag.replace('_', '-')} {was}, not {asked}: resume it with "
                "that, or start another with --out"
            )
    return saved


def schedule(sizes):
    """[96, 96, 224] → "96 px for 2, 224 px for 1" """
    runs = [(size, len(list(group))) for size, group in itertools.groupby(sizes)]
    return ", ".join(f"{size} px for {count}" for size, count in runs)
