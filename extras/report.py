"""The report of a network as one HTML file that opens anywhere: its table, its training, its filters, its
maps, what they responded to, and what goes beyond the report that these scripts reproduce.

python -m extras.report                                of your own run, or of the network that is shipped
python -m extras.report --compare docs/runs/quick      beside another run
python -m extras.report --full                         takes minutes: with what the strongest maps look for"""

import base64
import functools
from pathlib import Path

import jinja2

from common import checkpoint, cli, data, figures, inside, responses
from common.history import History, weights_of_run
from common.network import from_flags, weights_path
from extras import decision, gradcam, maximize, sanity_check, top_pictures
from MyResnet import table

TEMPLATE = Path(__file__).with_name("report.html")


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
    grey = 3 * weight.mean(1).square().sum((1, 2))  # the energy that is the same in all channels, of all
    alike = grey > 0.5 * weight.square().sum((1, 2, 3))
    weak = peaks.amax(1) < 0.1 * peaks.max()
    found = dict(largest=float(peaks.max()), number=number, color=("red", "green", "blue")[channel])
    return found | dict(alike=int(alike.sum()), weak=int(weak.sum()), count=len(weight))


def draw_layer(network, image, name, x, layer, images):
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
    present = data.is_present(args.dataset, args.data)
    if present and not network.photographs and list(network.classes) == data.CLASSES[args.dataset]:
        dataset = data.load(args.dataset, args.data, network.classes, ["test"])
        names = [network.classes[label] for label in dataset.test_labels]
        best = responses.cached_strongest(network, dataset.test_images)
        logits = inside.logits(network.model, best["conv5_x"][3])
        counts = figures.confusion_matrix(dataset.test_labels, logits)
    if network.model.fc.weight.device.type == "mps":  # which cannot maximise
        network.model.cpu()
    for facts in (facts for facts in layers if facts["silent"] < facts["count"]):
        name, channel = facts["name"], facts["strongest"]
        if best:
            everything = dataset.test_images, names
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


def command(args, script, flags=(*cli.NETWORK, "data", "image"), more=()):
    """What to type to have the script draw for the same network and image."""
    words = ["python", *script.split(), *map(str, more)]
    for flag in flags:
        value = getattr(args, flag)
        if value not in (None, cli.FLAGS[flag].get("default")):
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return cli.quote(*words)


def classes(network, history, counts, images):
    """Draws the confusion matrix that the `history` has, or else that of --full; returns what the report says
    of it."""
    split = "held-out" if history.settings.get("holdout") else "test"
    if not len(history.counts) and counts is not None:
        history.classes, history.counts, split = list(network.classes), counts, "test"
    if not len(history.counts):
        return dict(split=split, count=0)
    accuracy = history.counts.trace() / history.counts.sum()
    title = f"Confusion matrix of the {split} set (accuracy {accuracy:.2%})"
    images["confusion"] = figures.confusion(history.counts, history.classes, title)
    wrong = history.counts - history.counts.diagonal().diag()
    true, predicted = (history.classes[label] for label in divmod(int(wrong.argmax()), len(wrong)))
    return dict(split=split, count=int(wrong.max()), true=true, predicted=predicted)


def collect(args, other):
    """Draws all figures, for the flags and the `History` of a second run or None. Returns what the template
    is filled with."""
    network, image, name, x = from_flags(args)
    history, images = History(weights_path(args.weights, args.dataset)), {}
    print("drawing the figures, which takes minutes with --full …", flush=True)
    content = dict(args=args, network=network, history=history, name=name, other=other, images=images)
    content |= dict(rows=list(table(network.size, len(network.classes))), inside=inside)
    content |= dict(training=training(history, images), filters=filters(network, images))
    images["image"] = figures.side_by_side([image], [network.prediction(x)], title=name)
    layers = [draw_layer(network, image, name, x, stage, images) for stage in ("conv1", "conv5_x")]
    sanity, seeds = None, 5 if args.full else 1
    if layers[1]["silent"] < layers[1]["count"]:
        pattern = "conv5_x", layers[1]["strongest"], name
        images["sanity"], _, sanity = sanity_check.compare(network.model, x, *pattern, seeds)
    content |= dict(side=image.shape[-1], layers=layers, sanity=sanity, seeds=seeds)
    content["evidence"] = evidence(network, image, name, x, images)
    content["activations"], counts = beyond(network, args, layers, images) if args.full else ({}, None)
    content["mistake"] = classes(network, history, counts, images)
    content["differences"] = compared(history, other, images) if other else []
    return content | dict(command=functools.partial(command, args), NETWORK=cli.NETWORK)


def render(content):
    """The report as HTML; of `content`, the `images` are figures, or None."""
    images = {key: figures.png(figure) for key, figure in content["images"].items() if figure}
    images = {key: f"data:image/png;base64,{base64.b64encode(png).decode()}" for key, png in images.items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda value, digits=2: f"{value:.{digits}%}"
    environment.filters["plain"] = lambda value, digits=3: f"{value:.{digits}f}"
    environment.filters["thousands"] = lambda value: f"{value:,}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(content | dict(images=images))


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "data", "image", "out")
    parser.add_argument("--full", action="store_true", help="also what takes minutes: five random networks "
        "in the sanity check, and what the strongest maps look for")  # fmt: skip
    parser.add_argument("--compare", metavar="RUN", help="a second run: its folder, or its file of weights")
    args = parser.parse_args(argv)
    other = None
    if args.compare:  # now, so that an error comes before the long work
        other = History(weights_of_run(args.compare), "--compare")
    path = cli.make_folder(args.out) / "report.html"
    page = render(collect(args, other))
    with checkpoint.atomic_write(path) as file:
        file.write(page.encode(errors="replace"))
    print(path)


if __name__ == "__main__":
    main()
