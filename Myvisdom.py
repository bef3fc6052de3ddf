"""The live page of a run. `train.py` keeps one; `python Myvisdom.py` serves the saved pages again, and
`python Myvisdom.py --explore` opens one to look inside a network with."""

import base64
import html
import io
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import requests  # comes with visdom
import torch
import visdom
from PIL import Image
from tqdm import tqdm

from common import cli, visdom_files, visdom_server
from common.run import schedule

# A proxy is for the web, not for this machine.
for variable in ("NO_PROXY", "no_proxy"):
    os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1"]))

PAGES = Path("runs/visdom")  # where the server keeps what the pages show


def address(port):
    """Where the page is."""
    return f"http://127.0.0.1:{port}"


def listening(port):
    """Whether a visdom server listens on `port`. Raises `UserError` if something else does."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=3):
            pass
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # the request below says what is wrong
    try:
        answer = requests.post(f"{address(port)}/env_state", json={}, timeout=3)
        if isinstance(answer.json(), list):  # the names of its pages
            return True
    except requests.RequestException:  # no answer in time, not HTTP, or not JSON
        pass
    raise cli.UserError(
        f"port {port} is used by another program: --port takes a free one, --no-visdom does without"
    )


def start_server(port):
    """Starts a visdom server for this machine only, as a process of its own; returns the process."""
    # -P: common/ is not on its path. Ctrl-C is for the run, which ends the server itself.
    command = [sys.executable, "-P", visdom_server.__file__, str(port), str(PAGES)]
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(command, start_new_session=True, **silent)


def end_server(process):
    """Ends what `start_server` returned; None is no server."""
    if process:
        process.terminate()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:  # it hangs
            process.kill()
            process.wait()


class _Client(visdom.Visdom):
    """A server that hangs makes visdom's own client wait for ever, and that of visdom 0.3 leaves a thread."""

    def _start_session_reaper(self):
        pass

    def _handle_post(self, url, data=None):
        answer = self.session.post(url, data=data or {}, timeout=5)
        answer.raise_for_status()
        return answer.text


def connect(port, environment, events=False):
    """A client of the server on `port`, for one environment. Raises ConnectionError."""
    logging.getLogger("visdom").setLevel(logging.CRITICAL)
    options = dict(use_incoming_socket=events, raise_exceptions=True)
    return _Client("http://127.0.0.1", port=port, env=environment, **options)


def draw(client, title, traces, x="", y="", size=(400, 335), **layout):
    """A pane of plotly traces, called `title`."""
    legend = len(traces) > 1
    layout = dict(margin=dict(l=52, r=14, t=30 if legend else 10, b=40), showlegend=legend) | layout
    layout["legend"] = dict(orientation="h", x=0, y=1, yanchor="bottom", bgcolor="rgba(0, 0, 0, 0)")
    for axis, text in (("xaxis", x), ("yaxis", y)):
        layout[axis] = dict(title=text) | layout.get(axis, {})
    opts = dict(title=title, width=size[0], height=size[1])
    client._send(dict(data=traces, layout=layout, win=title, eid=client.env, opts=opts))


def draw_bars(client, title, values, marked, label, size, **layout):
    """A column chart of `values` [N], of which one stands out; it tells map and value under the pointer."""
    colours = ["#e4572e" if i == marked else "#4c78a8" for i in range(len(values))]
    hover = "map %{x}: %{y:.4f}<extra></extra>"
    trace = dict(type="bar", y=values.tolist(), hovertemplate=hover, marker=dict(color=colours))
    draw(client, title, [trace], "feature map", label, size, **layout)


def png(image):
    """A picture, uint8 [3, H, W], as the source of an HTML image."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Page:
    """The panes of one run, drawn anew every two seconds by a thread of its own from what the run has
    appended to `history`. So nothing that happens to the server stops the run or makes it wait, and a
    server that comes back shows everything.

    `history` and `settings` are a run's, `steps` are those of an epoch. The run sets `left`, how long it will
    take in words, and `evaluated`: the test pictures, their labels and the network's logits. Raises
    `UserError` if something else listens on `port`."""

    def __init__(self, history, settings, classes, steps, port):
        self.history, self.settings, self.classes, self.steps = history, settings, classes, steps
        self.name, self.port = settings["name"], port
        self.left, self.evaluated = "", None
        self.server, self.starts, self._told = None, 0, False
        if not listening(port):
            try:
                visdom_files.ensure()
            except cli.UserError as error:
                print(f"{error}. All else goes on, and {PAGES} keeps what the page would show")
            self.server = start_server(port)
        self._client = self._drawn = self._drawn_evaluation = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Draws and saves a last time, and ends the server if this page started it. Takes a moment, or if
        the server hangs up to 13 seconds."""
        self.left = ""
        self._give_up = time.monotonic() + 8  # a short run may be over before its server is up
        self._closing.set()
        try:
            self._thread.join(timeout=0 if kind is KeyboardInterrupt else 10)  # a second Ctrl-C is urgent
        finally:
            end_server(self.server)
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
                self._client = self._drawn = self._drawn_evaluation = None  # as new, when the server is back
                ended = self.server is None or self.server.poll() is not None
                if closing and (ended or time.monotonic() > self._give_up):
                    return
                time.sleep(0.2)

    def _draw(self):
        if self._client is None:
            ours = self.server is not None and self.server.poll() is None
            if not (ours or self._closing.is_set() or listening(self.port)):
                if self.starts == 3:  # it cannot, for whatever reason
                    raise ConnectionError
                self.starts += 1
                self.server = start_server(self.port)  # killed, or another run's and ended with it
            self._client = connect(self.port, self.name)
        count = len(self.history["loss"])
        asked = dict(win="Run", eid=self.name)  # not by win_exists, which prints when the server is gone
        if self._drawn and self._client._send(asked, endpoint="win_exists", quiet=True) != "true":
            # another server has come: it knows nothing
            self._drawn = self._drawn_evaluation = None
        now = (count, len(self.history["epochs"]), self.left, self.evaluated is self._drawn_evaluation)
        if now == self._drawn:
            return
        self._draw_iterations(count)
        self._draw_progress(count)
        if self.history["epochs"]:
            self._draw_epochs()
        if self.evaluated is not None and self.evaluated is not self._drawn_evaluation:
            evaluated = self.evaluated
            self._draw_confusion(*evaluated[1:])
            self._draw_mistakes(*evaluated)
            self._drawn_evaluation = evaluated
        self._drawn = now
        if not self._told:  # not before: visdom shows nothing, ever, to who comes too early
            tqdm.write(f"live page: {address(self.port)}/env/{quote(self.name)}")
            self._told = True

    def _draw_iterations(self, count):
        """The loss, the rate with the size of the pictures, and the speed, of `count` iterations."""
        loss, rates, clock = (np.array(self.history[key][:count]) for key in ("loss", "rate", "clock"))
        every = max(1, count // 2000)  # enough points for any screen
        x = np.arange(1, count + 1)
        window = max(1, min(100, count // 10))
        smooth = np.convolve(loss, np.ones(window) / window, "valid") if count else loss
        sizes = np.array(self.settings["sizes"])[
            np.minimum((x - 1) // self.steps, self.settings["epochs"] - 1)
        ]
        some = max(1, min(10, count // 4), count // 100)  # iterations between points of the speed
        speed = self.settings["batch_size"] * some / np.diff(clock[::some]).clip(1e-9)

        def line(x, y, name, **options):
            return dict(x=x.tolist(), y=y.tolist(), name=name, type="scatter", mode="lines", **options)

        # Colours are left to plotly, which gives others to another run that one compares this with.
        raw = line(x[::every], loss[::every], "each iteration", opacity=0.4, line=dict(width=1))
        mean = line(x[window - 1 :: every], smooth[::every], f"mean of {window}")
        draw(self._client, "Train Loss", [raw, mean], "iteration", "loss", yaxis=dict(rangemode="tozero"))
        rate = line(x[::every], rates[::every], "learning rate")
        size = line(x[::every], sizes[::every], "picture size, px", yaxis="y2")
        right = dict(overlaying="y", side="right", rangemode="tozero", showgrid=False)
        draw(
            self._client, "Learning Rate", [rate, size], "iteration", size=(290, 335), yaxis2=right,
            margin=dict(l=52, r=40, t=30, b=40),
        )  # fmt: skip
        draw(
            self._client, "Speed", [line(x[::some][1:], speed, "")], "iteration", "images/s", (240, 335),
            yaxis=dict(rangemode="tozero"),
        )  # fmt: skip

    def _draw_epochs(self):
        rows = list(self.history["epochs"])
        traces = [
            dict(
                x=[row["epoch"] for row in rows if row[key] is not None],
                y=[100 * row[key] for row in rows if row[key] is not None],
                name=name, type="scatter", mode="lines+markers",
            )
            for key, name in (
                ("test_accuracy", "validation"),
                ("train_accuracy", "training"),
                ("last_size_accuracy", f"at {self.settings['sizes'][-1]} px"),
            )
        ]  # fmt: skip
        draw(self._client, "Validation Accuracy", traces, "epoch", "%", xaxis=dict(dtick=1 + len(rows) // 12))

    def _draw_progress(self, count):
        epochs = self.settings["epochs"]
        done = len(self.history["epochs"])
        epoch = min(done, epochs - 1)
        best = max((row["test_accuracy"] for row in list(self.history["epochs"])), default=None)
        state = "finished" if done == epochs else "stopped" if self._closing.is_set() else "running"
        progress = {
            "state": state,
            "epoch": f"{epoch + 1} of {epochs}",
            "step": f"{count - epoch * self.steps} of {self.steps}",
            "time left": self.left or "–",
            "best validation accuracy": "–" if best is None else f"{best:.2%}",
        }
        cells = "".join(
            f"<tr><td><b>{html.escape(key)}</b>&emsp;</td><td>{html.escape(str(value))}</td></tr>"
            for key, value in (progress | self.settings | {"sizes": schedule(self.settings["sizes"])}).items()
        )
        opts = dict(title="Run", width=290, height=335)
        self._client.text(
            f"<table style='font-size:11px;line-height:1.25'>{cells}</table>", win="Run", opts=opts
        )

    def _draw_confusion(self, labels, logits):
        from sklearn.metrics import confusion_matrix  # takes a second to import: not at every start

        counts = confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), labels=range(len(self.classes)))
        trace = dict(
            type="heatmap", z=counts.tolist(), x=self.classes, y=self.classes, showscale=False,
            colorscale=[[0, "white"], [1, "#08306b"]],
            hovertemplate="%{z} pictures: %{y}, taken for %{x}<extra></extra>",
        )  # fmt: skip
        axis = dict(type="category", dtick=1, tickfont=dict(size=9))
        draw(
            self._client, "Confusion", [trace], "the network says", "it is", (330, 335),
            yaxis=axis | dict(autorange="reversed"), xaxis=axis,
            margin=dict(l=80, r=6, t=6, b=70),
        )  # fmt: skip

    def _draw_mistakes(self, images, labels, logits):
        """The test pictures that the network is most wrongly sure about."""
        sure, said = logits.softmax(1).max(1)
        worst = torch.where(said == labels, 0.0, sure).topk(min(21, len(labels))).indices
        cells = "".join(
            f"<div style='display:inline-block;width:68px;margin:2px;font-size:9px;line-height:1.1'>"
            f"<img src='{png(images[i])}' style='width:64px;image-rendering:pixelated'><br>"
            f"{self.classes[said[i]]} {sure[i]:.0%},<br>is {self.classes[labels[i]]}</div>"
            for i in worst.tolist()
            if said[i] != labels[i]
        )
        self._client.text(cells, win="Mistakes", opts=dict(title="Most wrongly sure", width=510, height=335))


def show(port, name, file, bars=None):
    """Adds a figure to the environment "figures" of the page on `port`, if one is open: the PNG `file`, or
    `bars` (title, values [N], label) as a column chart that tells map and value under the pointer."""
    try:
        if not listening(port):
            return
        client = connect(port, "figures")
        if bars:
            title, values, label = bars
            draw_bars(client, title, values, int(values.argmax()), label, (620, 300))
        else:
            image = np.array(Image.open(file).convert("RGB")).transpose(2, 0, 1)
            opts = dict(title=name, width=620, height=round(620 * image.shape[1] / image.shape[2]) + 25)
            client.image(image, win=name, opts=opts)
        client.save(["figures"])
    except (cli.UserError, ConnectionError):
        return  # the file is what counts


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "device", "port")
    parser.add_argument("--explore", action="store_true", help="a page to look inside a network with")
    args = parser.parse_args(argv)
    if args.explore:
        from common.explore import explore  # which takes from here

        return explore(args)
    if listening(args.port):
        print(f"a visdom server is there already: {address(args.port)}")
        return
    visdom_files.ensure()
    print(f"the pages of past runs: {address(args.port)}", flush=True)
    try:
        visdom_server.serve(args.port, PAGES)
    except OSError as error:
        raise cli.UserError(
            f"port {args.port} cannot be had ({error.strerror or error}): --port names another"
        )


if __name__ == "__main__":
    main()
