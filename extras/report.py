"""The report of a network as one HTML file that opens anywhere: its table, its training, its filters, its
maps, what they responded to, and what goes beyond the report that these scripts reproduce.

python -m extras.report                                of your own run, or of the network that is shipped
python -m extras.report --compare docs/runs/quick      beside another run
python -m extras.report --full                         takes minutes: with what the strongest maps look for"""

import base64
import csv
import itertools
from pathlib import Path

import jinja2
import torch

import MyResnet
from common import checkpoint, cli, data, figures, inside, responses, weights
from common.network import from_flags, weights_path
from extras import decision, gradcam, maximize, sanity_check, top_pictures

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS = "epoch iteration size train_loss train_accuracy test_loss test_accuracy seconds".split()
UNKNOWN = "not recorded"


class History:
    """What is known of a training run: from its checkpoint `settings`, `source` and `accuracy`; from the
    tables beside that `epochs` (rows of metrics.csv), `losses` (of loss.csv) and `counts` (of confusion.csv,
    as `figures.confusion_matrix`) of `classes`. What is not known is empty, and so is what does not fit the
    checkpoint. `path` is a file of weights, or a folder with tables alone. Raises `UserError`."""

    def __init__(self, path):
        path = Path(path)
        saved, folder = ({}, path) if path.is_dir() else (weights.read(path)[1], path.parent)
        kinds = dict(settings=dict, source=str, accuracy=float, classes=list)
        known = {key: saved[key] for key, kind in kinds.items() if isinstance(saved.get(key), kind)}
        here = path.resolve().is_relative_to(Path.cwd())
        self.name = path.resolve().relative_to(Path.cwd()).as_posix() if here else str(path)
        self.settings, self.source = known.get("settings", {}), known.get("source")
        rows, self.accuracy = _numbers(folder / "metrics.csv"), known.get("accuracy")
        if not saved and rows:
            self.accuracy = rows[-1].get("test_accuracy")
        whole = all(row.get(key) is not None for row in rows for key in COLUMNS)
        fits = rows and whole and rows[-1]["test_accuracy"] == self.accuracy
        self.epochs = [row | {key: int(row[key]) for key in COLUMNS[:3]} for row in rows] if fits else []
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
        groups = [(size, len(list(group))) for size, group in itertools.groupby(settings.get("sizes", []))]
        rate, warmup = settings.get("lr", UNKNOWN), settings.get("warmup")
        shape = f"rises for {warmup:.0%} of the run, then falls to 0" if warmup else "constant"
        momentum = f"{'Nesterov ' * bool(settings.get('nesterov'))}momentum {settings.get('momentum')}"
        factor = settings.get("muon_lr_factor")
        muon = f"Muon for the convolutions, at {factor} of the learning rate; for the rest " if factor else ""
        augmentation = [f"cropped up to {settings['shift']} of 32 px off centre"] * bool(
            settings.get("shift")
        )
        augmentation += ["half of them flipped"] * bool(settings.get("flip"))
        mean, std = (", ".join(map(str, settings.get(key, [UNKNOWN]))) for key in ("mean", "std"))
        return {
            "recipe": settings["recipe"],
            "data": self.source or UNKNOWN,
            "training images": f"{settings['pictures']:,}" if "pictures" in settings else UNKNOWN,
            "held out of them": settings.get("holdout") or "none",
            "epochs": settings["epochs"],
            "size of images": ", ".join(f"{size} px in {n} epochs" for size, n in groups) or UNKNOWN,
            "batch": f"{settings['batch_size']} images",
            "optimizer": f"{muon}SGD with {momentum}",
            "learning rate": f"{rate}, {shape}",
            "weight decay": settings.get("weight_decay", UNKNOWN),
            "label smoothing": settings.get("label_smoothing", UNKNOWN),
            "augmentation": ", ".join(augmentation) or "none",
            "mean of the pixels": mean,
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


def _numbers(path):
    """The rows of a table of numbers, {column: number or None}; [] if there is none, or something else."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        return []


def _confusion(path):
    """(classes, counts [classes, classes]) of confusion.csv; both are empty if there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            (_, *classes), *rows = csv.reader(file)
        return classes, torch.tensor([list(map(int, row[1:])) for row in rows]).view(2 * [len(classes)])
    except (OSError, ValueError, TypeError, RuntimeError):
        return [], torch.zeros(0, 0, dtype=torch.long)


def weights_of_run(run):
    """The file of weights that --compare names by itself or by its folder; a folder with tables alone is
    itself. Raises `UserError`."""
    run = Path(run)
    if not run.is_dir():
        return run
    found = [run / "weights.pt"] if (run / "weights.pt").exists() else sorted(run.glob("*.pt"))
    if len(found) > 1:
        raise cli.UserError(f"{run} has {len(found)} files of weights: --compare takes one of them")
    if not found and not (run / "metrics.csv").exists():
        raise cli.UserError(f"no run in {run}, neither weights nor tables: --compare takes the folder of one")
    return found[0] if found else run


def training(history, images):
    """Draws figures 6.1 and 6.2; returns what the report says of the training."""
    if history.epochs:
        title = f"ResNet-18, {history.settings.get('recipe', 'unknown')} recipe"
        sizes = history.settings.get("sizes") or [history.epochs[-1]["size"]]
        images["accuracy"] = figures.accuracy_curve(history.epochs, sizes[-1], title)
    if history.losses:
        images["loss"] = figures.loss_curve(history.losses, title)
    seconds = sum(row["seconds"] for row in history.epochs)
    best = max(history.epochs, key=lambda row: row["test_accuracy"], default=None)
    window, means = figures.running_mean(history.losses)
    return dict(seconds=seconds, best=best, window=window, means=means)


def filters(network, images):
    """Draws figures 7.1 to 7.3; returns what the report says of the filters of conv1."""
    weight = network.model.conv1.conv.weight.detach().cpu()
    images |= {f"filters_{name}": figure for name, figure in figures.filter_grids(weight)}
    peaks = weight.abs().amax((2, 3))  # of each filter in each channel
    number, channel = divmod(int(peaks.argmax()), 3)
    flat = weight.flatten(2) - weight.mean((2, 3))[..., None]
    flat = flat / flat.norm(dim=2, keepdim=True).clamp(min=1e-12)
    alike = (flat @ flat.mT).amin((1, 2)) > 0.9  # the correlations of the channels
    weak = peaks.amax(1) < 0.1 * peaks.max()
    found = dict(largest=float(peaks.max()), number=number, color=("red", "green", "blue")[channel])
    return found | dict(alike=int(alike.sum()), weak=int(weak.sum()), count=len(weight))


def layer(network, image, name, x, layer, images):
    """Draws figures 8.2 to 8.5 of a layer; returns what the report says of its maps."""
    (maps,) = inside.feature_maps(network.model, x, layer)
    maps = maps.detach()
    images[f"maps_{layer}"] = figures.map_grid(maps, layer, name)
    images[f"chart_{layer}"], (_, means, _), strongest = figures.activation_chart(maps, layer, name)
    shares = means.sort(descending=True).values.cumsum(0) / means.sum()
    found = dict(name=layer, count=len(means), height=maps.shape[2], width=maps.shape[3], strongest=strongest)
    found |= dict(value=float(means[strongest]), mean=float(means.mean()), half=int((shares < 0.5).sum()) + 1)
    found |= dict(
        silent=int((maps[0].amax((1, 2)) <= 0).sum()), field=inside.receptive_field(network.model, layer)
    )
    if found["silent"] < found["count"]:
        pattern = inside.reconstruct(network.model, x, layer, strongest)
        control = inside.control(network.model, x, pattern, layer, strongest)
        figure = figures.reconstruction(image, name, maps, pattern, layer, strongest, "guided", control)
        images[f"pattern_{layer}"] = figure
        found |= dict(pattern=bool(pattern.any()), control=bool(control[0].any()), correlation=control[1])
    return found


def evidence(network, image, name, x, images):
    """Draws Grad-CAM and the account of the decision; returns what the report says of them."""
    probabilities, order = network.model(x)[0].detach().softmax(0).sort(descending=True)
    heat = gradcam.gradcam(network.model, x, int(order[0]))
    images["gradcam"] = gradcam.draw(network, image, name, x)
    images["decision"], lines = decision.draw(network, image, name, x) if len(order) > 1 else (None, [])
    names = [network.classes[label] for label in order[:2]]
    place = divmod(int(heat.argmax()), heat.shape[1])
    found = dict(names=names, probabilities=probabilities[:2].tolist(), lines=lines, seen=bool(heat.any()))
    return found | dict(place=place, height=heat.shape[0], width=heat.shape[1])


def beyond(network, args, layers, images):
    """--full: draws the nine images and the maximised image of the strongest map of each of the `layers` that
    is not silent. Returns (the maximised images' mean activations by layer, the counts of the confusion
    matrix or None); without the test set of the network's classes only the former."""
    best, counts, activations = {}, None, {}
    present = args.data != "data" or data.is_present(args.dataset, args.data)
    if present and not network.photographs and list(network.classes) == data.CLASSES[args.dataset]:
        dataset = data.load(args.dataset, args.data, network.classes, ["test"])
        names = [network.classes[label] for label in dataset.test_labels]
        best = responses.cached_strongest(network, dataset.test_images)
        model = network.model
        logits = best["conv5_x"][3].T @ model.fc.weight.detach().cpu().T + model.fc.bias.detach().cpu()
        counts = figures.confusion_matrix(dataset.test_labels, logits)
    if network.model.fc.weight.device.type == "mps":  # which cannot maximise
        network.model.cpu()
    for facts in (facts for facts in layers if facts["silent"] < facts["count"]):
        name, channel = facts["name"], facts["strongest"]
        if best:
            everything = dataset.test_images, names.__getitem__
            images[f"nine_{name}"] = top_pictures.draw(network, *everything, best[name], name, channel)
        image, activations[name] = maximize.maximize(network, name, channel)
        reached = float(best[name][3][channel].max()) if best else None
        images[f"maximized_{name}"], _ = maximize.draw(image, name, channel, activations[name], reached)
    return activations, counts


def compared(history, other, images):
    """Draws the curves of two runs; returns the settings that differ, [(what, this, other)]."""
    runs = [(run.name, run.losses, run.epochs) for run in (history, other)]
    if history.epochs and other.epochs:
        images["compared"] = figures.compared_curves(runs)
    one, two = history.described(), other.described()
    return [(key, one[key], two[key]) for key in one if two and str(one[key]) != str(two[key])]


def render(**content):
    """The report as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda value, digits=2: f"{value:.{digits}%}"
    environment.filters["plain"] = lambda value, digits=3: f"{value:.{digits}f}"
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content)


def command(args, script, flags=(*cli.NETWORK, "dataset", "data", "image", "device"), more=()):
    """What to type to have the script draw for the same network and image."""
    words = ["python", *script.split(), *map(str, more)]
    for flag in flags:
        value = getattr(args, flag)
        if value not in (None, cli.FLAGS[flag].get("default")):
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return cli.quote(*words)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "dataset", "data", "image", "out", "device")
    parser.add_argument("--full", action="store_true", help="also what takes minutes: five random networks in "
        "the sanity check, and what the strongest maps look for")  # fmt: skip
    parser.add_argument("--compare", metavar="RUN", help="a second run: its folder, or its file of weights")
    args = parser.parse_args(argv)
    other = History(weights_of_run(args.compare)) if args.compare else None
    out = cli.make_folder(args.out)
    network, image, name, x = from_flags(args)
    history, images = History(weights_path(args.weights, args.dataset)), {}
    print("drawing the figures, which takes minutes with --full …", flush=True)

    content = dict(args=args, network=network, history=history, name=name, other=other, images=images)
    content |= dict(rows=list(MyResnet.table(network.size, len(network.classes))), inside=inside)
    content |= dict(training=training(history, images), filters=filters(network, images))
    content["side"] = image.shape[-1]
    images["image"] = figures.side_by_side([image], [network.prediction(x)], title=name)
    layers = content["layers"] = [layer(network, image, name, x, n, images) for n in ("conv1", "conv5_x")]
    content["sanity"], seeds = None, 5 if args.full else 1
    if layers[1]["silent"] < layers[1]["count"]:
        strongest = "conv5_x", layers[1]["strongest"], name
        figure, _, content["sanity"] = sanity_check.compare(network.model, x, *strongest, seeds)
        images["sanity"] = figure
    content["evidence"] = evidence(network, image, name, x, images)
    activations, counts = beyond(network, args, layers, images) if args.full else ({}, None)
    if counts is not None and not len(history.counts):
        history.classes, history.counts = network.classes, counts
    content["split"] = "held-out" if history.settings.get("holdout") and counts is None else "test"
    if len(history.counts):
        wrong = history.counts - history.counts.diagonal().diag()
        true, said = divmod(int(wrong.argmax()), len(wrong))
        content["mistake"] = dict(
            count=int(wrong.max()), true=history.classes[true], said=history.classes[said]
        )
        title = f"Confusion matrix of the {content['split']} set (accuracy {history.counts.trace() / history.counts.sum():.2%})"
        images["confusion"] = figures.confusion(history.counts, history.classes, title)
    content["differences"] = compared(history, other, images) if other else []
    for key, figure in images.items():
        images[key] = figure and "data:image/png;base64," + base64.b64encode(figures.png(figure)).decode()
    html = render(
        **content, activations=activations, seeds=seeds, command=lambda *a, **k: command(args, *a, **k)
    )
    with checkpoint.atomic_write(out / "report.html") as file:
        file.write(html.encode(errors="replace"))
    print(out / "report.html")


if __name__ == "__main__":
    main()
