"""Drawing: grids of maps and filters, column charts, curves, a picture beside its pattern."""

import contextlib
import math
import socket

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

from common.cli import UserError, folder

rcParams["text.parse_math"] = False  # titles have names of files in them, which may have $ in them


def save(figure, args, name, bars=None):
    """Writes the figure to the folder --out, prints its path, and shows it on the live page if one is
    open, there with `bars` (see `Myvisdom.show`) if given. Raises `UserError`."""
    path = folder(args.out) / name
    try:
        figure.savefig(path, dpi=90, pil_kwargs=dict(optimize=True))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another folder with --out")
    print(path)
    nothing_there = contextlib.suppress(OSError, ImportError)
    with nothing_there, socket.create_connection(("127.0.0.1", args.port), timeout=1):
        from Myvisdom import show  # imports visdom, which takes a second

        show(args.port, name, path, bars)


def show(axes, tensor, **options):
    """Draws uint8 [3, H, W] or float [3, H, W] in 0 … 1 as a picture without ticks."""
    axes.imshow(tensor.permute(1, 2, 0).cpu().numpy(), **options)
    axes.set(xticks=[], yticks=[])


def neutral(pattern):
    """A pattern of either sign as a picture in 0 … 1: zero at neutral grey, its largest at full strength."""
    return 0.5 + pattern / (2 * pattern.abs().max().clamp(min=1e-12))


def tile(cells, columns, gap):
    """[N, h, w] or [N, h, w, 3] → one array, `columns` cells a row, NaN between the cells."""
    n, h, w = cells.shape[:3]
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, *cells.shape[3:]), np.nan)
    for i, cell in enumerate(cells):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = cell
    return sheet


def grid(cells, columns, title, scale=None, label="", signed=False):
    """A figure of all cells [N, h, w], numbered at the edges, on one scale from 0 (or, if `signed`, from
    -`scale`, with zero at neutral grey) to `scale`; `label` is the colour bar's.

    Or of RGB cells [N, 3, h, w] in 0 … 1, which need no scale."""
    cells = cells.detach().cpu()
    rgb = cells.dim() == 4
    cells = (cells.permute(0, 2, 3, 1) if rgb else cells).numpy()
    n, h, w = cells.shape[:3]
    gap = 1 + w // 40
    sheet = tile(cells, columns, gap)
    height = 9 * sheet.shape[0] / sheet.shape[1] * (0.95 if rgb else 0.88) + 0.9
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(
        np.nan_to_num(sheet, nan=1.0) if rgb else sheet,
        cmap="gray" if signed else "inferno",
        vmin=-scale if signed else 0,
        vmax=scale,
        interpolation="nearest",
    )
    across, down = range(0, columns, max(1, columns // 16)), range(math.ceil(n / columns))
    axes.set_xticks([c * (w + gap) + (w - 1) / 2 for c in across], [f"+{c}" for c in across])
    axes.set_yticks([r * (h + gap) + (h - 1) / 2 for r in down], [r * columns for r in down])
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("number: that of the row + that of the column", fontsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    if not rgb:
        figure.colorbar(shown, label=label, shrink=0.6, aspect=30)
    return figure


def column_chart(values, marked, title, label):
    """A figure with a column for each of `values` [N]; number `marked` stands out, with its value."""
    values = values.cpu().numpy()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(values)), values, width=1.0 if len(values) > 100 else 0.8, color="#4c78a8")
    axes.bar(marked, values[marked], width=1.0 if len(values) > 100 else 0.8, color="#e4572e")
    side = "left" if marked < len(values) / 10 else "right" if marked > len(values) * 0.9 else "center"
    options = dict(textcoords="offset points", ha=side, color="#b03a16")
    axes.annotate(f"map {marked}: {values[marked]:.3f}", (marked, values[marked]), (0, 4), **options)
    axes.set(title=title, xlabel="feature map", ylabel=label, xlim=(-1, len(values)))
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def picture(image, title, caption):
    """A figure of one picture, uint8 [3, S, S]."""
    figure = Figure(figsize=(4.5, 5), layout="constrained")
    axes = figure.subplots()
    show(axes, image)
    axes.set(title=title, xlabel=caption)
    return figure


def picture_and_pattern(image, feature_map, pattern, title, captions):
    """A figure of three: the picture, uint8 [3, S, S]; the map, [h, w]; the pattern, [3, H, W], zero at
    neutral grey and its largest value at full strength."""
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    axes = figure.subplots(1, 3)
    show(axes[0], image)
    values = feature_map.detach().cpu().numpy()
    lowest, highest = min(0, values.min()), max(0, values.max())  # below 0 before a ReLU
    shown = axes[1].imshow(values, cmap="inferno", vmin=lowest, vmax=highest if lowest < highest else 1)
    axes[1].set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[1], label="activation", shrink=0.75)
    show(axes[2], neutral(pattern))
    for axis, caption in zip(axes, captions):
        axis.set_xlabel(caption)
    figure.suptitle(title)
    return figure


def loss_curve(losses, title):
    """Figure 6.2: training loss per iteration, faint, under its running mean."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    losses = np.asarray(losses)
    axes.plot(np.arange(1, len(losses) + 1), losses, color="#9db7d5", lw=0.7, label="each iteration")
    window = max(1, min(100, len(losses) // 10))
    if window > 1:
        mean, label = np.convolve(losses, np.ones(window) / window, "valid"), f"mean of the last {window}"
        axes.plot(np.arange(window, len(losses) + 1), mean, color="#1f4e8c", label=label)
    axes.set(title=f"Training loss ({title})", xlabel="iteration", ylabel="training loss", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def accuracy_curve(epochs, last_size, title):
    """Figure 6.1: accuracy after each epoch, on the test set and in training; `epochs` are rows of
    metrics.csv, `last_size` the size that the run ends at. Dotted lines show where the size changes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style, colour in (
        ("test_accuracy", "validation", "o-", "#1f4e8c"),
        ("train_accuracy", "training", "o-", "#e4572e"),
        ("last_size_accuracy", f"validation at {last_size} px", "s--", "#2a9d8f"),
    ):
        rows = [row for row in epochs if row[key] is not None]
        if key != "last_size_accuracy" or any(row["size"] != last_size for row in rows):
            x, y = [row["epoch"] for row in rows], [100 * row[key] for row in rows]
            axes.plot(x, y, style, ms=3, color=colour, label=label)
    for before, row in zip([None, *epochs], epochs):
        if before is None or before["size"] != row["size"]:
            left = row["epoch"] - 0.5
            axes.axvline(left, color="grey", lw=0.8, ls=":")
            axes.annotate(
                f"{row['size']} px", (left, 0.01), xycoords=("data", "axes fraction"), fontsize=8,
                color="grey", xytext=(3, 0), textcoords="offset points",
            )  # fmt: skip
    axes.set(title=f"Accuracy after each epoch ({title})", xlabel="epoch", ylabel="accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.3)
    return figure


def confusion(counts, classes, title):
    """A figure of a confusion matrix [classes, classes]: rows are what a picture is, columns what the
    network takes it for; each cell has its count, in figures and as its colour."""
    from sklearn.metrics import ConfusionMatrixDisplay  # takes a second to import: not at every start

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay(counts, display_labels=classes).plot(ax=axes, cmap="Blues", xticks_rotation=45)
    axes.set(title=title, xlabel="the network says", ylabel="it is")
    return figure
