"""A training run on disk: what it consists of, saving it, resuming it, keeping an earlier one.

Its files are last.pt (all it takes to resume), weights.pt (all it takes to look inside), loss.csv,
metrics.csv and their curves, and at its end confusion.csv."""

import contextlib
import itertools
import math
import os
import sys
import time

import filelock
import torch
from tqdm import tqdm

from common import checkpoint, cli, distributed, figures
from common.cli import UserError
from common.device import memory_format
from common.muon import Muon
from MyResnet import ResNet18

FILES = "weights.pt metrics.csv loss.csv loss.png accuracy.png confusion.csv last.pt".split()


class Run:
    """The state of a run: `model`, `optimizers`, `scaler`, and in `history` what happened, per iteration
    and per epoch (the rows of metrics.csv). With the seed the history says what comes next, so no other state
    needs to be saved. `out` is the run's folder, `saved` a checkpoint to go on from, `init` a state dict to
    start from, whose fc is skipped if its number of classes differs. Raises `UserError` if `saved` is
    damaged."""

    def __init__(self, settings, dataset, out, device, saved=None, init=None):
        self.settings, self.out, self.last = settings, out, out / "last.pt"
        self.about = dict(classes=list(dataset.classes), source=dataset.source, settings=settings)
        self.batch_size = min(settings["batch_size"], len(dataset.train_images))
        self.steps = len(dataset.train_images) // self.batch_size  # in an epoch
        torch.manual_seed(settings["seed"])
        self.model = ResNet18(len(dataset.classes)).to(device, memory_format=memory_format(device))
        if init:
            state = self.model.state_dict()
            self.model.load_state_dict(state | {k: v for k, v in init.items() if v.shape == state[k].shape})
        self.optimizers = self._optimizers()
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
        self.history = dict(loss=[], accuracy=[], rate=[], clock=[], epochs=[], seconds=0.0)
        if saved:
            try:
                for name, part in self._states().items():
                    part.load_state_dict(saved[name])
                self.history |= saved["history"]
            except (KeyError, RuntimeError, TypeError, ValueError, AttributeError):
                raise UserError(f"{self.last} is of another network, or damaged: start anew in another --out")
        self.saved_iteration, self.save_failed = self.iteration, False  # what last.pt has; the latest save
        self.pending = None  # the latest step's result and learning rate, while they are on the device
        self.saved_at = time.monotonic()  # history["seconds"], those of the unfinished epoch, are up to then
        self.mark = time.perf_counter()  # history["clock"], the seconds of training, is up to then

    def _optimizers(self):
        """SGD for all weights, or Muon for the convolutions and SGD for the others, by their key in a
        checkpoint. Runs from before Muon came have no setting for it."""
        settings, parameters = self.settings, list(self.model.parameters())
        muon = [p for p in parameters if p.ndim == 4] if settings.get("muon_lr_factor") else []
        weights = [p for p in parameters if p.ndim == 2 or p.ndim == 4 and not muon]
        others = [p for p in parameters if p.ndim == 1]  # of batch norms, and fc's bias
        groups = [dict(params=weights, weight_decay=settings["weight_decay"]), dict(params=others)]
        options = {key: settings[key] for key in ("lr", "momentum", "nesterov")}
        optimizers = dict(optimizer=torch.optim.SGD(groups, **options))
        if muon:
            optimizers["muon"] = Muon(muon, settings["lr"], settings["momentum"], settings["precision"])
        return optimizers

    def _states(self):
        """What a checkpoint holds the state of, by its key there."""
        return dict(model=self.model, scaler=self.scaler) | self.optimizers

    def set_learning_rate(self, lr):
        """Sets the optimizers' learning rates: SGD's to `lr`, Muon's to its multiple of that."""
        for name, optimizer in self.optimizers.items():
            factor = self.settings["muon_lr_factor"] if name == "muon" else 1
            for group in optimizer.param_groups:
                group["lr"] = factor * lr

    @property
    def iteration(self):
        """How many iterations are in the history."""
        return len(self.history["loss"])

    def record(self, result, learning_rate):
        """Adds an iteration: `result` is its [loss, accuracy], a tensor that is read when the next iteration
        is added, so that the device need not wait. Raises `UserError` if a loss is not finite."""
        self.read_pending()
        self.pending = result, learning_rate

    def read_pending(self):
        """Adds the latest result to the history. Raises `UserError` if its loss is not finite."""
        if self.pending is None:
            return
        (loss, accuracy), rate = self.pending[0].tolist(), self.pending[1]
        self.pending = None
        problem = f"the loss is {loss} in iteration {self.iteration + 1}, at learning rate {rate:.3g}"
        self._require_finite(math.isfinite(loss), problem)
        now = time.perf_counter()
        clock = (self.history["clock"] or [0.0])[-1] + now - self.mark
        for key, value in dict(clock=clock, rate=rate, accuracy=accuracy, loss=loss).items():
            self.history[key].append(value)  # the loss last: the live page counts by it
        self.mark = now

    def _require_finite(self, finite, problem):
        if not finite:
            kept = f"{self.last} still has the run up to iteration {self.saved_iteration}"
            way_out = "start another with a lower --lr, or with --precision fp32"
            raise UserError(f"{problem}: the run stops; {kept}: {way_out}")

    def end_epoch(self, size, test_loss, test_accuracy, last_size_accuracy):
        """Adds an epoch, with what was measured after it, to the history; returns its row."""
        loss, accuracy = (sum(self.history[key][-self.steps :]) / self.steps for key in ("loss", "accuracy"))
        row = dict(epoch=len(self.history["epochs"]) + 1, iteration=self.iteration, size=size)
        row |= dict(train_loss=loss, train_accuracy=accuracy, test_loss=test_loss)
        row |= dict(test_accuracy=test_accuracy, last_size_accuracy=last_size_accuracy)
        row["seconds"] = round(self.history["seconds"] + time.monotonic() - self.saved_at, 1)
        self.history["epochs"].append(row)
        self.history["seconds"], self.saved_at = 0.0, time.monotonic()
        return row

    def save(self, curves=False, required=False):
        """Writes all files, `curves` only on demand. A save that fails is reported or, if it is `required`,
        raised as `UserError`; weights that are not finite always raise that."""
        self.read_pending()
        now, history, sizes = time.monotonic(), self.history, self.settings["sizes"]
        history["seconds"] += now - self.saved_at
        self.saved_at = now
        state = self.model.state_dict()
        # Biases and what batch norms have remain float32.
        halves = {name: t.cpu().half() if t.ndim > 1 else t.cpu() for name, t in state.items()}
        finite = all(bool(tensor.isfinite().all()) for tensor in halves.values())
        rate = f", at learning rate {history['rate'][-1]:.3g}" if history["rate"] else ""
        self._require_finite(finite, f"the weights are not finite after iteration {self.iteration}{rate}")
        if distributed.RANK:
            return  # the first process writes
        network = self.about | dict(model=state, mean=self.settings["mean"], std=self.settings["std"])
        network["size"] = sizes[max(0, self.iteration - 1) // self.steps]  # the last it was trained at
        network["accuracy"] = history["epochs"][-1]["test_accuracy"] if history["epochs"] else None
        states = {name: part.state_dict() for name, part in self._states().items()}
        try:
            checkpoint.save(network | states | dict(history=history), self.last)
            self.saved_iteration = self.iteration
            if self.iteration:
                checkpoint.save(network | dict(model=halves), self.out / "weights.pt")
            self._write_tables()
            if curves:
                self._draw_curves()
            self.save_failed = False
        except (UserError, OSError) as error:
            self.save_failed = True
            message = f"{error}; {self.last} has iteration {self.saved_iteration}"
            if required:
                raise UserError(message)
            tqdm.write(f"{message}; training goes on, and the next save tries again", file=sys.stderr)
        self.mark = time.perf_counter()

    @contextlib.contextmanager
    def explain_failures(self, micro_batches):
        """Context manager: turns refused memory and a lost process into a `UserError` with the way out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            kept, parts = f"{self.last} has iteration {self.saved_iteration}", 2 * micro_batches
            if cli.out_of_memory(error):
                way_out = f"--resume --accumulate {parts} takes it in {parts} parts"
                raise UserError(f"not enough memory for this batch: {way_out}; {kept}")
            if distributed.peer_lost(error):
                raise UserError(f"{distributed.PEER_LOST}; {kept}: --resume goes on")
            raise

    def _write_tables(self):
        history, epochs = self.history, self.history["epochs"]
        columns = history["loss"], history["accuracy"], history["rate"]
        steps = ([i, *(f"{value:.6g}" for value in row)] for i, row in enumerate(zip(*columns), 1))
        tables = {"loss.csv": [["iteration", "loss", "accuracy", "rate"], *steps]}
        if epochs:
            tables["metrics.csv"] = [epochs[0].keys(), *(row.values() for row in epochs)]
        for name, rows in tables.items():
            checkpoint.save_table(rows, self.out / name)

    def _draw_curves(self):
        """Figures 6.1 and 6.2."""
        title = f"ResNet-18, {self.settings['dataset']}, recipe {self.settings['recipe']}"
        curves = {"loss.png": figures.loss_curve(self.history["loss"], title)}
        if epochs := self.history["epochs"]:
            curves["accuracy.png"] = figures.accuracy_curve(epochs, self.settings["sizes"][-1], title)
        for name, figure in curves.items():
            with checkpoint.atomic_write(self.out / name) as file:
                figure.savefig(file, format="png", dpi=110)


@contextlib.contextmanager
def locked(out):
    """Context manager: keeps other runs from writing to `out`, and removes the temporary files of a killed
    save. Raises `UserError` if another run is writing there."""
    lock = filelock.FileLock(out / ".train.py.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another run is writing to {out}: let it end, or choose another --out")
    except (OSError, NotImplementedError):
        pass  # there are no locks, or nothing can be written: the first save reports it
    try:
        for name in FILES:
            for leftover in out.glob(f"{name}.{'[0-9a-f]' * 32}.tmp"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows removes it when it is released
                os.unlink(lock.lock_file)
            lock.release()


def archive_previous(out):
    """Moves a run that is in the folder `out` already to a new folder in it: nothing is overwritten."""
    old = [out / name for name in FILES if (out / name).exists()]  # last.pt last: till then it can go on
    if old:
        archives = (out / f"earlier-{number}" for number in itertools.count(1))
        archive = next(folder for folder in archives if not folder.exists())
        archive.mkdir()
        for path in old:
            path.rename(archive / path.name)
        print(f"the run that was in {out} is now in {archive}")


def load_for_resume(args):
    """The checkpoint of the run in --out. Raises `UserError` if there is none, or if flags contradict it."""
    path = args.out / "last.pt"
    if not path.is_file():
        raise UserError(f"no run to resume in {args.out}: --out names the folder of one")
    saved = checkpoint.load(path)
    flags = "dataset recipe epochs batch_size size lr seed precision limit holdout".split()
    try:
        values = {flag: saved["settings"]["sizes" if flag == "size" else flag] for flag in flags}
        values["size"] = values["size"][0] if len(set(values["size"])) == 1 else None
        warmup, done = saved["settings"]["warmup"], len(saved["history"]["epochs"])
        saved["optimizer"], saved["history"]["loss"]
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path} is no checkpoint of a run: --out names the folder of one")
    if warmup is None and done < (args.epochs or 0):  # a constant learning rate goes on as long as one likes
        settings = saved["settings"]
        values["epochs"] = settings["epochs"] = args.epochs
        settings["sizes"] = (settings["sizes"] + settings["sizes"][-1:] * args.epochs)[: args.epochs]
    for flag, value in values.items():
        if (requested := getattr(args, flag)) not in (None, "auto", value):
            name = f"--{flag.replace('_', '-')}"
            has, how = (f"no {name}", "without") if value is None else (f"{name} {value}", "with")
            problem = f"the run in {args.out} has {has}, not {requested}"
            way_out = f"resume it {how} that, or start another with --out"
            if flag == "epochs":
                way_out += f", from its weights with --init {args.out / 'weights.pt'}"
            raise UserError(f"{problem}: {way_out}")
    return saved
