"""The live page of a run. `train.py` keeps one; `python Myvisdom.py` serves the saved pages again, and
`python Myvisdom.py --explore` opens one to look inside a network with."""

import html
import logging
import threading
import time
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

from common import cli, figures
from common.page import assets, client, server


class Page:
    """The panes of one run, drawn every two seconds by a thread from the run's `history`. So nothing that
    happens to the server stops the run or makes it wait, and a server that comes back shows everything.

    `steps` are those of an epoch. The run sets `eta`, the time left in words, and `evaluation`: the test
    images, their labels and the network's logits. Raises `UserError` if something else listens on `port`."""

    def __init__(self, history, settings, classes, steps, port):
        self.history, self.settings, self.classes, self.steps = history, settings, classes, steps
        self.name, self.port = settings["name"], port
        self.eta, self.evaluation = "", None
        self.server, self.starts, self._announced = None, 0, False
        if not client.is_listening(port):
            try:
                assets.ensure()
            except cli.UserError as error:
                print(f"{error}. All else goes on, and {client.PAGES} keeps what the page would show")
            self.server = client.start_server(port)
        self._client = self._drawn = self._drawn_evaluation = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Draws and saves a last time, and ends the server if this page started it: at most 13 seconds."""
        self.eta = ""
        self._give_up = time.monotonic() + 8  # a short run may be over before its server is up
        self._closing.set()
        try:
            self._thread.join(timeout=0 if kind is KeyboardInterrupt else 10)  # a second Ctrl-C is urgent
        finally:
            client.stop_server(self.server)
        if self._drawn is None:
            print("the live page could not be drawn: python Myvisdom.py shows what is wrong")

    def _work(self):
        while True:
            closing = self._closing.wait(2)
            try:
                self._draw()
                if closing:
                    self._client.save([self.name])
                    return
            except Exception as error:  # the page is a comfort, never a reason to end the run
                logging.getLogger(__name__).debug("the live page: %r", error)
                self._client = self._drawn = self._drawn_evaluation = None  # the server may be another
                ended = self.server is None or self.server.poll() is not None
                if closing and (ended or time.monotonic() > self._give_up):
                    return
                time.sleep(0.2)

    def _draw(self):
        if self._client is None:
            running = self.server is not None and self.server.poll() is None
            if not (running or self._closing.is_set() or client.is_listening(self.port)):
                if self.starts == 3:  # it cannot, for whatever reason
                    raise ConnectionError
                self.starts += 1
                self.server = client.start_server(self.port)  # killed, or another run's and ended with it
            self._client = client.connect(self.port, self.name)
        elif self._drawn and not client.has_pane(self._client, "Run"):  # another server has come
            self._drawn = self._drawn_evaluation = None
        count, evaluation = len(self.history["loss"]), self.evaluation
        state = count, len(self.history["epochs"]), self.eta, evaluation is self._drawn_evaluation
        if state == self._drawn:
            return
        self._draw_iterations(count)
        self._draw_run(count)
        if self.history["epochs"]:
            self._draw_epochs()
        if evaluation is not None and evaluation is not self._drawn_evaluation:
            self._draw_confusion(*evaluation[1:])
            self._draw_mistakes(*evaluation)
            self._drawn_evaluation = evaluation
        self._drawn = state
        if not self._announced:  # not before: visdom shows nothing, ever, to who comes too early
            tqdm.write(f"live page: {client.address(self.port)}/env/{quote(self.name)}")
            self._announced = True

    def _draw_iterations(self, count):
        """The loss, the learning rate with the size of the images, and the speed, of `count` iterations."""
        loss, rates, clock = (np.array(self.history[key][:count]) for key in ("loss", "rate", "clock"))
        every = max(1, count // 2000)  # enough points for any screen
        iterations = np.arange(1, count + 1)
        window, means = figures.running_mean(loss)
        sizes = np.repeat(self.settings["sizes"], self.steps)[:count]
        stride = max(1, min(10, count // 4), count // 100)  # iterations between points of the speed
        speed = self.settings["batch_size"] * stride / np.diff(clock[::stride]).clip(1e-9)

        def line(x, y, name, **options):
            return dict(x=x.tolist(), y=y.tolist(), name=name, type="scatter", mode="lines", **options)

        # Colours are left to plotly, which gives others to another run that one compares this with.
        raw = line(iterations[::every], loss[::every], "each iteration", opacity=0.4, line=dict(width=1))
        mean = line(iterations[window - 1 :: every], means[::every], f"mean of {window}")
        from_zero = dict(rangemode="tozero")
        client.draw(self._client, "Train Loss", [raw, mean], "iteration", "loss", yaxis=from_zero)
        rate = line(iterations[::every], rates[::every], "learning rate")
        size = line(iterations[::every], sizes[::every], "image size, px", yaxis="y2")
        right = dict(overlaying="y", side="right", showgrid=False, rangemode="tozero")
        options = dict(size=(290, 335), yaxis2=right, margin=dict(l=52, r=40, t=30, b=40))
        client.draw(self._client, "Learning Rate", [rate, size], "iteration", **options)
        trace = line(iterations[::stride][1:], speed, "")
        client.draw(self._client, "Speed", [trace], "iteration", "images/s", (240, 335), yaxis=from_zero)

    def _draw_epochs(self):
        rows, traces = list(self.history["epochs"]), []
        at_last_size = f"at {self.settings['sizes'][-1]} px"
        names = dict(test_accuracy="validation", train_accuracy="training", last_size_accuracy=at_last_size)
        for key, name in names.items():
            x = [row["epoch"] for row in rows if row[key] is not None]
            y = [100 * row[key] for row in rows if row[key] is not None]
            traces.append(dict(x=x, y=y, name=name, type="scatter", mode="lines+markers"))
        ticks = dict(dtick=1 + len(rows) // 12)
        client.draw(self._client, "Validation Accuracy", traces, "epoch", "%", xaxis=ticks)

    def _draw_run(self, count):
        """What the run is, and how far."""
        epochs, rows = self.settings["epochs"], list(self.history["epochs"])
        epoch, best = min(len(rows), epochs - 1), max([row["test_accuracy"] for row in rows], default=None)
        state = "stopped" if self._closing.is_set() else "running"
        progress = {
            "state": "finished" if len(rows) == epochs else state,
            "epoch": f"{epoch + 1} of {epochs}",
            "step": f"{count - epoch * self.steps} of {self.steps}",
            "time left": self.eta or "–",
            "best validation accuracy": "–" if best is None else f"{best:.2%}",
        }
        cells = "".join(
            f"<tr><td><b>{html.escape(key)}</b>&emsp;</td><td>{html.escape(str(value))}</td></tr>"
            for key, value in (progress | self.settings).items()
            if key != "sizes"  # "schedule" says it in a line
        )
        table = f"<table style='font-size:11px;line-height:1.25'>{cells}</table>"
        self._client.text(table, win="Run", opts=dict(title="Run", width=290, height=335))

    def _draw_confusion(self, labels, logits):
        counts, hover = figures.confusion_matrix(labels, logits), "%{z} images: %{y}, taken for %{x}"
        trace = dict(type="heatmap", z=counts.tolist(), x=self.classes, y=self.classes, showscale=False)
        trace |= dict(colorscale=[[0, "white"], [1, "#08306b"]], hovertemplate=f"{hover}<extra></extra>")
        axis = dict(type="category", dtick=1, tickfont=dict(size=9))
        axes = dict(xaxis=axis, yaxis=axis | dict(autorange="reversed"), margin=dict(l=80, r=6, t=6, b=70))
        client.draw(self._client, "Confusion", [trace], "the network says", "it is", (330, 335), **axes)

    def _draw_mistakes(self, images, labels, logits):
        """The test images that the network is most wrongly sure about."""
        confidence, predicted = logits.softmax(1).max(1)
        worst = torch.where(predicted == labels, 0.0, confidence).topk(min(21, len(labels))).indices
        cells = "".join(
            f"<div style='display:inline-block;width:68px;margin:2px;font-size:9px;line-height:1.1'>"
            f"<img src='{client.png(images[i])}' style='width:64px;image-rendering:pixelated'><br>"
            f"{self.classes[predicted[i]]} {confidence[i]:.0%},<br>is {self.classes[labels[i]]}</div>"
            for i in worst.tolist()
            if predicted[i] != labels[i]
        )
        self._client.text(cells, win="Mistakes", opts=dict(title="Most wrongly sure", width=510, height=335))


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "device", "port")
    parser.add_argument("--explore", action="store_true", help="a page to look inside a network with")
    args = parser.parse_args(argv)
    if args.explore:
        from common.page.explorer import explore  # which imports what the other pages do without

        return explore(args)
    if client.is_listening(args.port):
        print(f"a visdom server is there already: {client.address(args.port)}")
        return
    assets.ensure()
    print(f"the pages of past runs: {client.address(args.port)}", flush=True)
    try:
        server.serve(args.port, client.PAGES)
    except OSError as error:
        reason = error.strerror or error
        raise cli.UserError(f"port {args.port} cannot be had ({reason}): --port names another")


if __name__ == "__main__":
    main()
