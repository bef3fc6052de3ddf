"""Drawing: grids of maps and filters, column charts, curves, images side by side."""

import io
import itertools
import math
import sys
import textwrap

import numpy as np
from matplotlib import font_manager, rcdefaults, rcParams
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from common import inside

if "ipykernel" not in sys.modules:  # a notebook keeps its style
    rcdefaults()  # a user's matplotlibrc may turn images upside down, or need LaTeX
rcParams["text.parse_math"] = False  # titles have names of files in them, which may have $ in them

PATTERN = "the pattern, by {}\n(grey is zero, {})"  # the caption


def drawable(text):
    """The text with "?" for what the font lacks, as it may of the name of a file or a class."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(c if c == "\n" or font.get_char_index(ord(c)) else "?" for c in text)


def replace_undrawable(figure):
    """Makes all texts of a figure `drawable`, but for the labels of ticks."""
    for text in figure.findobj(Text):
        text.set_text(drawable(text.get_text()))


def png(figure):
    """The figure as the bytes of a PNG file."""
    replace_undrawable(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, pil_kwargs=dict(optimize=True))
    return file.getvalue()


def show(axes, image, **options):
    """Draws an image, uint8 [3, H, W], float [3, H, W] in 0 … 1 or any [1, H, W], without ticks. Returns what
    a colour bar takes."""
    axes.set(xticks=[], yticks=[])
    return axes.imshow(image.detach().permute(1, 2, 0).cpu().numpy(), **options)


def pattern_image(pattern):
    """A pattern [3, H, W] of either sign, or each of several [N, 3, H, W], as an image in 0 … 1: zero is
    mid-grey, its largest value at full contrast."""
    return 0.5 + pattern / (2 * pattern.abs().amax((-3, -2, -1), keepdim=True).clamp(min=1e-12))


def describe_scale(pattern):
    """The scale of a `pattern_image`, in words."""
    return f"full contrast ±{pattern.abs().max():.2g}"


def overlay(axes, image, evidence, limit):
    """Draws `evidence` [h, w] for a class, from 0 to `limit`, over the image, uint8 [3, H, W], in grey; what
    is below 0 is left out. Returns what a colour bar takes."""
    show(axes, (image.float().mean(0, keepdim=True) / 255).expand(3, -1, -1))
    options = dict(cmap="inferno", alpha=0.6, vmin=0, vmax=limit or 1.0, interpolation="bilinear")
    return axes.imshow(evidence.cpu().numpy(), extent=axes.images[0].get_extent(), **options)


def explain(figure, text):
    """Writes under a figure how to read it, for somebody who has not read the paper; returns the figure."""
    figure.supxlabel(textwrap.fill(" ".join(text.split()), int(14 * figure.get_figwidth())), fontsize=9)
    return figure


def side_by_side(images, captions, title, rows=1):
    """A figure of `images` side by side, each with its caption below it: [3, H, W] as in `show`, or a feature
    map [h, w], which gets a colour bar. `rows` is 2 to leave room for a second, lower row."""
    figure = Figure(figsize=(3.3 * len(images) + 1.2, 2.6 + 1.7 * rows), layout="constrained")
    figure.suptitle(title)
    cells = figure.add_gridspec(rows, len(images), height_ratios=[2, 1][:rows])
    upper = [figure.add_subplot(cells[0, i]) for i in range(len(images))]
    for axes, image, caption in zip(upper, images, captions):
        axes.set_xlabel(caption)
        if image.dim() == 3:
            show(axes, image)
        else:
            low, high = min(0, image.min().item()), max(0, image.max().item())  # low is below 0 before a ReLU
            shown = show(axes, image[None], cmap="inferno", vmin=low, vmax=high if low < high else 1)
            figure.colorbar(shown, ax=axes, label="activation", shrink=0.75)
    return figure


def reconstruction(image, name, maps, pattern, layer, channel, method, control):
    """Figures 8.5.1 and 8.5.2: the image, uint8 [3, S, S]; map `channel` of its `maps`, [1, channels, h, w];
    the pattern [3, H, W] that the map responded to, by `method`; below, what `inside.control` gave for it."""
    caption = PATTERN.format(inside.METHOD_NAMES[method], describe_scale(pattern))
    captions = name, inside.describe_map(maps, layer, channel), caption
    images = image, maps[0, channel], pattern_image(pattern)
    figure = side_by_side(images, captions, f"What map {channel} of {layer} responded to", rows=2)
    _add_control(figure, layer, *control)
    return figure


def _add_control(figure, layer, pattern, correlation):
    """Draws a control in the lower row of a figure by `side_by_side`, with its verdict; returns its axes."""
    cells = figure.axes[0].get_subplotspec().get_gridspec()
    text, axes = figure.add_subplot(cells[1, :-1]), figure.add_subplot(cells[1, -1])
    meaning = "(1 means that the same pixels stand out in both; 0, that they have nothing in common.)"
    verdict = textwrap.fill(f"{inside.describe_control(layer, correlation)} {meaning}", 66)
    text.text(0, 0.6, verdict, va="center")
    text.set_axis_off()
    show(axes, pattern_image(pattern))
    axes.set_xlabel(f"control ({describe_scale(pattern)})")
    return axes


def close_up(image, name, pattern, layer, channel, method, control):
    """As `reconstruction`, of a map's strongest position alone: the image with a frame around what the
    pattern covers, that part of it enlarged, and the pattern there; under it the control there."""
    top, left, bottom, right = inside.smallest_box(pattern)
    height, width = pattern.shape[1:]
    where = f"where 90 % of the pattern is\n({right - left}×{bottom - top} of {width}×{height} px)"
    title = f"What map {channel} of {layer} responded to at its strongest position"
    captions = name, where, PATTERN.format(inside.METHOD_NAMES[method], describe_scale(pattern))
    figure = side_by_side((image, image, pattern_image(pattern)), captions, title, rows=2)
    drawn = [*figure.axes, _add_control(figure, layer, *control)]
    frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec="red", lw=2)
    figure.axes[0].add_patch(frame)
    for axes in drawn:
        axes.images[0].set_extent((-0.5, width - 0.5, height - 0.5, -0.5))  # the image may be smaller
    for axes in drawn[1:]:
        axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
    return figure


def grid(cells, columns, title, scale=None, label="", signed=False):
    """A figure of all cells, numbered at the edges: [N, h, w] on one scale from 0 (`signed`: -`scale`) to
    `scale`, whose colour bar has the `label`, or RGB [N, 3, h, w] in 0 … 1, which need no scale."""
    from torchvision.utils import make_grid  # takes a second to import: not at every start

    rgb, (h, w) = cells.dim() == 4, cells.shape[-2:]
    cells, gap = cells.detach().cpu().reshape(len(cells), -1, h, w), 1 + w // 40
    sheet = make_grid(cells, columns, gap, pad_value=1.0 if rgb else math.nan)
    height = 9 * sheet.shape[1] / sheet.shape[2] * (0.95 if rgb else 0.88) + 0.9
    axes = Figure(figsize=(9, height), layout="constrained").subplots()
    options = dict(cmap="gray" if signed else "inferno", vmin=-scale if signed else 0, vmax=scale)
    shown = show(axes, sheet if rgb else sheet[:1], interpolation="nearest", **options)
    across, down = range(0, columns, max(1, columns // 16)), range(math.ceil(len(cells) / columns))
    axes.set_xticks([gap + c * (w + gap) + (w - 1) / 2 for c in across], [f"+{c}" for c in across])
    axes.set_yticks([gap + r * (h + gap) + (h - 1) / 2 for r in down], [r * columns for r in down])
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("number = row label + column label", fontsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    if not rgb:
        axes.figure.colorbar(shown, label=label, shrink=0.6, aspect=30)
    return axes.figure


def filter_grids(filters):
    """(the end of a file name, figure) of figures 7.1 to 7.3 and of the same in colour, for the filters
    [N, 3, k, k] of conv1, as they are."""
    scale = dict(scale=filters.abs().max(), label="weight (one scale for all channels)", signed=True)
    for channel, colour in enumerate(("red", "green", "blue")):
        title = f"Channel_{channel}: what the {len(filters)} filters of conv1 look for in {colour}"
        yield f"channel_{channel}", grid(filters[:, channel], columns=8, title=title, **scale)
    title = f"The {len(filters)} filters of conv1 in colour (grey is zero, each at full contrast)"
    yield "rgb", grid(pattern_image(filters), columns=8, title=title)


def map_grid(maps, layer, name):
    """Figures 8.2 and 8.3: all feature maps [1, channels, h, w] of a layer, for the image of that name."""
    count, height, width = maps.shape[1:]
    title = f"The {count} feature maps of {layer}, {height}×{width} each ({name})"
    label = "activation (one scale, to the 99.5th percentile)"
    return grid(maps[0], 8 if count == 64 else 32, title, maps.quantile(0.995), label)


def activation_chart(maps, layer, name):
    """Figures 8.4.1 and 8.4.2: the mean activation of each of the maps [1, channels, h, w] of a layer, the
    strongest marked. Returns (the figure, (title, values [channels], label), the strongest map)."""
    activations = inside.mean_activations(maps)
    strongest = int(activations.argmax())
    title = f"How strongly each of the {len(activations)} maps of {layer} responds ({name})"
    axes = Figure(figsize=(11, 4.2), layout="constrained").subplots()
    draw_columns(axes, activations, [strongest], title, "mean activation")
    return axes.figure, (title, activations, "mean activation"), strongest


def draw_columns(axes, values, marked, title, label, text="map {}: {:.3f}"):
    """Draws a column for each of `values` [N]; those in `marked` stand out, each with its `text`."""
    values = values.cpu().numpy()
    width = 1.0 if len(values) > 100 else 0.8
    axes.bar(range(len(values)), values, width, color="#4c78a8")
    axes.bar(marked, values[marked], width, color="#e4572e")
    for n in marked:
        side = "left" if n < len(values) / 10 else "right" if n > len(values) * 0.9 else "center"
        offset = (0, 4 if values[n] >= 0 else -12)
        options = dict(textcoords="offset points", ha=side, color="#b03a16")
        axes.annotate(text.format(n, values[n]), (n, values[n]), offset, **options)
    axes.set(title=title, xlabel="feature map", ylabel=label, xlim=(-1, len(values)))
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(losses):
    """(window, means [N - window + 1]) of losses [N]; the window is a tenth of them, at most 100."""
    window = max(1, min(100, len(losses) // 10))
    return window, np.convolve(losses, np.ones(window) / window, "valid") if len(losses) else losses


def loss_curve(losses, title):
    """Figure 6.2: training loss per iteration, faint, under its running mean."""
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    iterations, marker = np.arange(1, len(losses) + 1), "o" if len(losses) == 1 else ""
    axes.plot(iterations, losses, color="#9db7d5", lw=0.7, marker=marker, label="each iteration")
    window, means = running_mean(losses)
    if window > 1:
        axes.plot(iterations[window - 1 :], means, color="#1f4e8c", label=f"mean of the last {window}")
    axes.set(title=f"Training loss ({title})", xlabel="iteration", ylabel="training loss", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return axes.figure


def accuracy_curve(epochs, last_size, title):
    """Figure 6.1: accuracy after each epoch, on the test set and in training; `epochs` are rows of
    metrics.csv, `last_size` the size that the run ends at. Dotted lines show where the size changes."""
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    grows = any(row["size"] != last_size for row in epochs)
    for key, label, style, color in (
        ("test_accuracy", "validation", "o-", "#1f4e8c"),
        ("train_accuracy", "training", "o-", "#e4572e"),
        ("last_size_accuracy", f"validation at {last_size} px", "s--", "#2a9d8f"),
    ):
        rows = [row for row in epochs if row[key] is not None]
        if key != "last_size_accuracy" or grows:
            x, y = [row["epoch"] for row in rows], [100 * row[key] for row in rows]
            axes.plot(x, y, style, ms=3, color=color, label=label)
    for size, rows in itertools.groupby(epochs if grows else [], lambda row: row["size"]):
        left = next(rows)["epoch"] - 0.5
        axes.axvline(left, color="grey", lw=0.8, ls=":")
        axes.text(left, 0.01, f" {size} px", transform=axes.get_xaxis_transform(), color="grey", fontsize=8)
    axes.set(title=f"Accuracy after each epoch ({title})", xlabel="epoch", ylabel="accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.3)
    return axes.figure


def compared_curves(runs):
    """The curves of several runs in one figure, from (name, losses [N], rows of metrics.csv) of each: the
    running mean of the training loss, and the accuracy after each epoch, at that epoch's size."""
    left, right = Figure(figsize=(11, 4.5), layout="constrained").subplots(1, 2)
    for (name, losses, epochs), color in zip(runs, ("#1f4e8c", "#e4572e")):
        window, means = running_mean(losses)
        if len(means):
            iterations, label = np.arange(window, window + len(means)), f"{name}, mean of {window}"
            left.plot(iterations, means, color=color, label=label)
        accuracies = [100 * row["test_accuracy"] for row in epochs]
        right.plot([row["epoch"] for row in epochs], accuracies, "o-", ms=3, color=color, label=name)
    left.set(title="Training loss", xlabel="iteration", ylabel="training loss", ylim=(0, None))
    right.set(title="Validation accuracy after each epoch", xlabel="epoch", ylabel="accuracy, %")
    right.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axes in left, right:
        if axes.lines:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return left.figure


def mistakes(images, rows, split, command=None):
    """A sheet of the fifty most confident mistakes, the first of what `inside.mistakes` returned, among
    images uint8 [N, 3, S, S]. `command` is what explains one, if anything does."""
    count = min(50, len(rows))
    figure = Figure(figsize=(13, 1.2 + 1.75 * math.ceil(count / 10)), layout="constrained")
    figure.suptitle(f"The {count} most confident of {len(rows):,} mistakes on the {split} set")
    cells = list(figure.subplots(math.ceil(count / 10), 10, squeeze=False).flat)
    for axes, (number, name, predicted, confidence) in zip(cells, rows):
        show(axes, images[number])
        axes.set_title(f"{number}: {name}", fontsize=8)
        axes.set_xlabel(f"{predicted} {confidence:.1%}", fontsize=8, color="#b03a16")
    for axes in cells[count:]:
        axes.set_axis_off()
    text = "Above an image: its number and what it is. Below it: what the network says, and its confidence."
    return explain(figure, f"{text} {command} tells why." if command else text)


def confusion_matrix(labels, logits):
    """How many images of each class, the rows, are taken for each class, the columns: int64 [classes,
    classes] on the CPU, from labels [N] and logits [N, classes]."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    return pairs.bincount(minlength=classes**2).view(classes, classes).cpu()


def confusion(counts, classes, title):
    """A figure of what `confusion_matrix` counted; each cell has its count, as a number and as its colour."""
    from sklearn.metrics import ConfusionMatrixDisplay  # takes a second to import: not at every start

    axes = Figure(figsize=(8, 7), layout="constrained").subplots()
    display = ConfusionMatrixDisplay(counts.numpy(), display_labels=[drawable(name) for name in classes])
    display.plot(ax=axes, cmap="Blues", xticks_rotation=45)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    return axes.figure
