"""What is known of a network's training: from its checkpoint, and from the tables of the run beside it."""

import csv
import itertools
import math
from pathlib import Path

import torch

from common import cli, weights
from common.cli import UserError

COLUMNS = "epoch iteration size train_loss train_accuracy test_loss test_accuracy seconds".split()
UNKNOWN = "not recorded"


class History:
    """What is known of a training run: from its checkpoint `settings`, `source` and `accuracy`; from the
    tables beside that `epochs` (rows of metrics.csv), `losses` (of loss.csv) and `counts` (of confusion.csv,
    as `figures.confusion_matrix`) of `classes`. What is not known is empty, and so is what does not fit the
    checkpoint. `path` is a file of weights, or a folder with tables alone; an error names `flag`
    as the way to another one. Raises `UserError`."""

    def __init__(self, path, flag="--weights"):
        path = Path(path)
        saved, folder = ({}, path) if path.is_dir() else (weights.read(path, flag)[1], path.parent)
        kinds = dict(settings=dict, source=str, accuracy=float, classes=list)
        known = {key: saved[key] for key, kind in kinds.items() if isinstance(saved.get(key), kind)}
        here = path.resolve().is_relative_to(Path.cwd())
        self.name = path.resolve().relative_to(Path.cwd()).as_posix() if here else str(path)
        self.settings, self.source = known.get("settings", {}), known.get("source")
        if "recipe" not in self.settings:  # they are not of train.py
            self.settings = {}
        rows, self.accuracy = _numbers(folder / "metrics.csv"), known.get("accuracy")
        if not saved and rows:
            self.accuracy = rows[-1].get("test_accuracy")
        complete = all(row.get(key) is not None for row in rows for key in COLUMNS)
        fits = rows and complete and rows[-1]["test_accuracy"] == self.accuracy
        self.epochs = [dict(last_size_accuracy=None) | row for row in rows if fits]
        steps = _numbers(folder / "loss.csv") if fits else []
        self.losses = [row["loss"] for row in steps if row.get("loss") is not None]
        self.classes, self.counts = _confusion(folder / "confusion.csv")
        total, right = int(self.counts.sum()), int(self.counts.diagonal().sum())
        near = total and self.accuracy and abs(right / total - self.accuracy) < max(0.002, 1.5 / total)
        if not near or self.classes != known.get("classes", self.classes):
            self.classes, self.counts = known.get("classes", []), torch.zeros(0, 0, dtype=torch.long)

    @property
    def class_accuracies(self):
        """{class: accuracy 0 … 1}."""
        return dict(zip(self.classes, (self.counts.diagonal() / self.counts.sum(1).clamp(min=1)).tolist()))

    def described(self):
        """The settings in words, {what: value}; {} where none are known."""
        settings = {key: UNKNOWN for key in "recipe epochs batch_size precision seed".split()} | self.settings
        if not self.settings:
            return {}
        rate, warmup = settings.get("lr", UNKNOWN), settings.get("warmup")
        shape = f"rises for {warmup:.0%} of the run, then falls to 0" if warmup else "constant"
        momentum = f"{'Nesterov ' * bool(settings.get('nesterov'))}momentum {settings.get('momentum')}"
        factor = settings.get("muon_lr_factor")
        muon = f"Muon for the convolutions, at {factor} of the learning rate; for the rest " if factor else ""
        shift, flip = settings.get("shift"), settings.get("flip")
        augmentation = [f"cropped up to {shift} of 32 px off centre"] * bool(shift)
        augmentation += ["half of them flipped"] * bool(flip)
        mean, std = (", ".join(map(str, settings.get(key, [UNKNOWN]))) for key in ("mean", "std"))
        return {
            "recipe": settings["recipe"],
            "data": self.source or UNKNOWN,
            "training images": f"{settings['pictures']:,}" if "pictures" in settings else UNKNOWN,
            "held-out images": settings.get("holdout") or "none",
            "epochs": settings["epochs"],
            "image size": schedule(settings.get("sizes", [])) or UNKNOWN,
            "batch": f"{settings['batch_size']} images",
            "optimizer": f"{muon}SGD with {momentum}",
            "learning rate": f"{rate}, {shape}",
            "weight decay": settings.get("weight_decay", UNKNOWN),
            "label smoothing": settings.get("label_smoothing", UNKNOWN),
            "augmentation": ", ".join(augmentation) or "none",
            "pixel mean": mean,
            "standard deviation": std,
            "start": f"the weights in {settings['init']}" if settings.get("init") else "random weights",
            "seed": settings["seed"],
            "precision": settings["precision"],
            "machine": settings.get("machine", UNKNOWN),
        }

    def command(self):
        """What to type for the same training."""
        names = "recipe dataset epochs batch_size lr seed precision limit holdout init".split()
        values = {name: self.settings[name] for name in names if self.settings.get(name) is not None}
        if len(sizes := set(self.settings.get("sizes", []))) == 1:
            values["size"] = sizes.pop()
        flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items())
        return cli.quote("python", "train.py", *itertools.chain(*flags))


def schedule(sizes):
    """The image sizes of a run's epochs in words: [96, 96, 224] → "2 epochs at 96 px, 1 epoch at 224 px"."""
    groups = [(size, len(list(group))) for size, group in itertools.groupby(sizes)]
    return ", ".join(f"{count} epoch{'s' * (count > 1)} at {size} px" for size, count in groups)


def _numbers(path):
    """The rows of a table of numbers, {column: number or None}; [] if there is none, or something else."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []


def _number(text):
    """The number, or None if there is none or it is not finite."""
    value = float(text) if text else math.nan
    return int(value) if value.is_integer() else value if math.isfinite(value) else None


def _confusion(path):
    """(classes, counts [classes, classes]) of confusion.csv; both are empty if there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            (_, *classes), *rows = csv.reader(file)
        return classes, torch.tensor([list(map(int, row[1:])) for row in rows]).view(2 * [len(classes)])
    except (OSError, ValueError, TypeError, RuntimeError, csv.Error):
        return [], torch.zeros(0, 0, dtype=torch.long)


def weights_of_run(run):
    """The weights of the run that --compare names by its file or folder; for a folder with tables alone, that
    folder. Raises `UserError`."""
    run = Path(run)
    if not run.is_dir():
        return run
    found = [run / "weights.pt"] if (run / "weights.pt").exists() else sorted(run.glob("*.pt"))
    if len(found) > 1:
        raise UserError(f"{run} has {len(found)} files of weights: --compare takes one of them")
    if not found and not (run / "metrics.csv").exists():
        raise UserError(f"no run in {run}, neither weights nor tables: --compare takes the folder of one")
    return found[0] if found else run
