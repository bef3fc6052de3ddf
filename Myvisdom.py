"""The live page of a run. `train.py` keeps one; `python Myvisdom.py` serves the saved pages again, and
`python Myvisdom.py --explore` opens one to look inside a network with."""

import contextlib
import html
import logging
import threading
import time
from urllib.parse import quote, urlencode

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import cli, data, figures, inside
from common.page import assets, client, front, server, tiles

PATIENCE = 60  # seconds: the longest that the end of a run waits for its page
LOOKED_AT = 50  # test images by which a map is called silent


class Page:
    """The panes of one run, drawn every two seconds by a thread from the run's `history`. So nothing that
    happens to the server stops the run or makes it wait, and a server that comes back shows everything.
    `steps` are those of an epoch. The run sets `eta`, the time left in words, and calls `evaluated`. Raises
    `UserError` if something else listens on `port`."""

    def __init__(self, history, settings, classes, steps, port):
        self.history, self.settings, self.classes, self.steps = history, settings, classes, steps
        self.name, self.port = settings["name"], port
        self.evaluation = self.filters = self.server = self._client = self._drawn_evaluation = None
        self.eta, self.starts, self._announced = "", 0, False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def evaluated(self, model, images, labels, logits, size):
        """For the run to call after an evaluation: takes what the page shows of the network, `model` as it
        is now, and its `logits` [N, classes] of the images, uint8 [N, 3, S, S], resized to `size`."""
        x = data.normalize_and_resize(images[:LOOKED_AT], size, self.settings["mean"], self.settings["std"])
        filters = model.conv1.conv.weight.detach().cpu().clone()
        self.filters = filters, inside.silent_shares(model, x), len(x)
        self.evaluation = images, labels, logits

    def __enter__(self):
        if not client.is_listening(self.port):
            try:
                assets.ensure()
            except cli.UserError as error:
                print(f"{error}. Training goes on, and {client.PAGES} keeps what the page would show")
            self.server = client.start_server(self.port)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        """Draws and saves a last time, and ends the server if this page started it."""
        self.eta = ""
        self._closing.set()
        try:
            if not self._announced:  # a short run may be over before its server is up
                print("waiting for the live page …", flush=True)
            self._thread.join(timeout=0 if kind is KeyboardInterrupt else PATIENCE)  # 2nd Ctrl-C: urgent
        finally:
            client.stop_server(self.server)
        if self._client is None:
            command = f"python Myvisdom.py{cli.port_flag(self.port)}"
            print(f"the live page could not be drawn: {command} shows what is wrong")

    def _work(self):
        while True:
            closing = self._closing.wait(2)
            try:
                self._draw()
                if closing:
                    return
            except Exception as error:  # the page is a convenience, never a reason to end the run
                logging.getLogger(__name__).debug("the live page: %r", error)
                self._client = self._drawn_evaluation = None  # the server may be another
                ended = self.server is None or self.server.poll() is not None
                if closing and (ended or self._announced):  # not one that is still starting
                    return
                time.sleep(0.2)

    def _draw(self):
        connected = self._client is None
        if connected:
            running = self.server is not None and self.server.poll() is None
            if not (running or self._closing.is_set() or client.is_listening(self.port)) and self.starts < 3:
                self.starts += 1
                self.server = client.start_server(self.port)  # killed, or another run's and ended with it
            self._client = client.connect(self.port, self.name)
        count, rows, evaluation = len(self.history["loss"]), list(self.history["epochs"]), self.evaluation
        self._draw_iterations(count)
        self._draw_run(count, rows)
        drawn = evaluation is self._drawn_evaluation
        new_evaluation = evaluation and not (drawn and self._client.win_exists("Mistakes"))
        if connected or new_evaluation:
            self._draw_filters()
        if rows:
            self._draw_epochs(rows)
        if new_evaluation:  # or the server is another
            self._draw_evaluation(*evaluation)
            self._drawn_evaluation = evaluation
        if not self._announced:  # only now: a browser that comes before the first pane stays blank
            tqdm.write(f"live page: {client.address(self.port)}/env/{quote(self.name)}")
            self._announced = True
        if connected or new_evaluation or self._closing.is_set():
            self._client.save([self.name])  # now, since the server may be killed
            front.draw(self._client)

    def _draw_iterations(self, count):
        """The loss; the learning rate, the size of the images and the speed: of `count` iterations."""
        loss, rates, clock = (np.array(self.history[key][:count]) for key in ("loss", "rate", "clock"))
        iterations = np.arange(1, count + 1)
        window, means = figures.running_mean(loss)
        sizes = np.repeat(self.settings["sizes"], self.steps)[:count]
        stride = max(1, min(10, count // 4), count // 100)  # iterations between points of the speed
        speed = self.settings["batch_size"] * stride / np.diff(clock[::stride]).clip(1e-9)

        def line(x, y, name, **options):
            thinned = slice(None, None, max(1, len(x) // 2000))  # enough points for any screen
            points = dict(x=x[thinned].tolist(), y=y[thinned].tolist())
            mode = "lines" if len(x) > 1 else "markers"  # a line of one point is not seen
            return dict(points, name=name, type="scatter", mode=mode, **options)

        # Colours are left to plotly, which gives others to another run that one compares this with.
        raw = line(iterations, loss, "each iteration", opacity=0.4, line=dict(width=1))
        mean = line(iterations[window - 1 :], means, f"mean of {window}")
        from_zero = dict(rangemode="tozero")
        client.draw(self._client, "Train Loss", [raw, mean], "iteration", "loss", (375, 335), yaxis=from_zero)
        rate = line(iterations, rates, "learning rate")
        size = line(iterations, sizes, "image size, px", yaxis="y2")
        lower = line(iterations[stride::stride], speed, "images/s", yaxis="y3", showlegend=False)
        axes = dict(xaxis=dict(anchor="y3"), yaxis=from_zero | dict(domain=[0.55, 1]))
        axes["yaxis2"] = from_zero | dict(overlaying="y", side="right", showgrid=False, automargin=True)
        axes["yaxis3"] = from_zero | dict(domain=[0, 0.42], title="images/s")
        title = "Learning Rate and Speed"
        client.draw(self._client, title, [rate, size, lower], "iteration", size=(285, 335), **axes)

    def _draw_epochs(self, rows):
        names = dict(test_accuracy="validation", train_accuracy="training")
        if len(set(self.settings["sizes"])) > 1:
            names["last_size_accuracy"] = f"at {self.settings['sizes'][-1]} px"
        traces = []
        for key, name in names.items():
            x = [row["epoch"] for row in rows if row[key] is not None]
            y = [100 * row[key] for row in rows if row[key] is not None]
            traces.append(dict(x=x, y=y, name=name, type="scatter", mode="lines+markers"))
        ticks = dict(dtick=1 + len(rows) // 12)
        client.draw(self._client, "Validation Accuracy", traces, "epoch", "%", (375, 335), xaxis=ticks)

    def _draw_run(self, count, rows):
        """What the run is, and how far."""
        epochs = self.settings["epochs"]
        epoch = min(len(rows), epochs - 1)
        state = "stopped" if self._closing.is_set() else "running"
        progress = {
            "state": "finished" if len(rows) == epochs else state,
            "epoch": f"{epoch + 1} of {epochs}",
            "step": f"{count - epoch * self.steps} of {self.steps}",
            "time left": self.eta or "–",
            "best validation accuracy": f"{max(row['test_accuracy'] for row in rows):.2%}" if rows else "–",
            "drawn": time.strftime(front.TIME),
        }
        settings = {key: str(value) for key, value in self.settings.items()}
        for key in "sizes", "weights", "data":  # "schedule" says it in a line; the links have the others
            settings.pop(key, None)
        short = [key for key, value in settings.items() if len(value) < 12]  # two of these stand in a row
        progress |= {key: value for key, value in settings.items() if key not in short}
        tables = [_table({key: settings[key] for key in keys}) for keys in (short[::2], short[1::2])]
        tables.insert(0, _table(progress) + "<br>")
        self._client.text("".join(tables), win="Run", opts=dict(title="Run", width=340, height=335))

    def _draw_evaluation(self, images, labels, logits):
        """The confusion matrix, and the test images with the most confident mistakes."""
        counts, classes = figures.confusion_matrix(labels, logits), self.classes
        trace = dict(type="heatmap", z=counts.tolist(), x=classes, y=classes, showscale=False)
        trace["hovertemplate"] = "%{z} images: %{y}, taken for %{x}<extra></extra>"
        trace["colorscale"] = [[0, "white"], [1, "#08306b"]]
        trace |= dict(texttemplate="%{z}", textfont=dict(size=10))
        axis = dict(type="category", dtick=1, tickfont=dict(size=10))
        axes = dict(xaxis=axis | dict(tickangle=-35), yaxis=axis | dict(autorange="reversed"))
        axes["margin"] = dict(l=85, r=6, t=6, b=75)
        client.draw(self._client, "Confusion", [trace], "predicted class", "true class", (445, 335), **axes)
        worst = inside.mistakes(labels, logits, classes)[:18]
        text = "image {0}:<br>{2} {3:.0%},<br>is {1}"  # its number, and what the network takes it for
        captions = [text.format(*row) for row in worst]
        opts, title = dict(width=410, height=335), "Most confident mistakes"
        if not self.settings.get("holdout"):  # else they are no test images, which the explorer opens
            title += ": click one to see why"
            flags = {key: self.settings.get(key, "") for key in ("weights", "dataset", "data")}
            opts["links"] = [f"/env/explore?{urlencode(flags | dict(image=row[0]))}" for row in worst]
        numbers = [row[0] for row in worst]
        client.draw_images(self._client, "Mistakes", images[numbers], captions, 64, 9, title=title, **opts)

    def _draw_filters(self):
        """The filters of conv1, and the share of silent maps of each stage; before an evaluation a note."""
        opts = dict(title="Filters of conv1", width=215, height=335)
        if not self.filters:
            if not self._client.win_exists("Filters"):  # else they are an earlier part's of a resumed run
                self._client.text("They come after the first epoch.", win="Filters", opts=opts)
            return
        filters, silent, count = self.filters
        cells = F.pad(255 * figures.pattern_image(filters), (1, 0, 1, 0), value=255).to(torch.uint8)
        sheet = torch.cat([torch.cat(list(row), 2) for row in cells.split(8)], 1)
        tile = tiles.tile(sheet, f"All {len(filters)}, each at full contrast.", 190, 11)
        bar = "<div style='display:inline-block;background:#4c78a8;height:8px;width:{:.0f}px'></div> {:.0%}"
        table = _table({stage: bar.format(80 * share, share) for stage, share in silent.items()}, str)
        note = f"Maps that respond to none of {count} images:"
        content = f"{tile}<div style='font-size:11px;margin:2px'>{note}<br>{table}</div>"
        self._client.text(content, win="Filters", opts=opts)


def _table(rows, escape=html.escape):
    """{key: value} as an HTML table, which stands beside another where there is room."""
    cells = "".join(
        f"<tr><td><b>{key}</b>&ensp;</td><td>{escape(str(value))}</td></tr>" for key, value in rows.items()
    )
    style = "display:inline-table;margin-right:12px;vertical-align:top;font-size:11px;line-height:1.35"
    return f"<table style='{style}'>{cells}</table>"


def show_front(port):
    """Draws the front page, and prints where the newest run's page is. Raises ConnectionError."""
    for name in front.draw(client.connect(port, "main"))[:1]:
        print(f"the newest of them: {client.address(port)}/env/{quote(name)}", flush=True)


def keep_front(port):
    """Draws the front page when the server is there, and again every 10 seconds: a run may be killed."""
    shown = False
    while True:
        with contextlib.suppress(cli.UserError, ConnectionError):
            if client.is_listening(port):
                front.draw(client.connect(port, "main")) if shown else show_front(port)
                shown = True
        time.sleep(10 if shown else 0.1)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "data", "port")
    parser.add_argument("--explore", action="store_true", help="open a page for looking inside a network")
    image_help = "with --explore: image N of the test set, an image file or a folder of them; may be repeated"
    parser.add_argument("--image", action="append", default=[], metavar="N|FILE", help=image_help)
    args = parser.parse_args(argv)
    if not args.explore and (args.image or args.weights):
        parser.error("--image and --weights go with --explore")
    if args.explore:
        from common.page.explorer import explore  # which imports what the other pages do without

        return explore(args)
    if client.is_listening(args.port):
        print(f"a visdom server is there already: {client.address(args.port)}")
        return show_front(args.port)
    assets.ensure()
    cli.make_folder(client.PAGES, "start this in another folder")
    print(f"the pages of past runs: {client.address(args.port)} (Ctrl-C ends it)", flush=True)
    threading.Thread(target=keep_front, args=[args.port], daemon=True).start()
    try:
        server.serve(args.port, client.PAGES)
    except OSError as error:
        raise cli.UserError(
            f"no server on port {args.port} ({error.strerror or error}): choose another --port"
        )


if __name__ == "__main__":
    main()
