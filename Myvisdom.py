"""The live page of a run. `train.py` keeps one; `python Myvisdom.py` serves the saved pages again."""

import html
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import requests  # comes with visdom
import visdom

from common import cli

# A proxy is for the web, not for this machine.
for variable in ("NO_PROXY", "no_proxy"):
    os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1"]))

PORT = 8097
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
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, which ends the server itself
    )


class Page:
    """The panes of one run, drawn anew every two seconds by a thread of its own from what the run has
    appended to `history`. So nothing that happens to the server stops the run or makes it wait, and a
    server that comes back shows everything.

    `history` is a dictionary with "loss" (a number per iteration), "rate" (likewise) and "epochs"
    (rows of metrics.csv); `name` is the page's environment in visdom; `settings` is a dictionary. The
    run sets `status`, a line of text. Raises `UserError` if something else listens on `port`."""

    def __init__(self, history, name, settings, port=PORT):
        self.history, self.settings, self.port = history, settings, port
        self.name = name
        self.status = "starting"
        self.server = None if listening(port) else start_server(port)
        self._client = None
        self._drawn = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        print(f"live page: {address(port)}/env/{name}")

    def close(self, status):
        """Draws and saves a last time, and ends the server if this page started it. Takes a moment, at
        most ten seconds."""
        self.status = status
        self._give_up = time.monotonic() + 8  # a short run may be over before its server is up
        self._closing.set()
        try:
            self._thread.join(timeout=10)
        finally:
            if self.server:
                self.server.terminate()
                self.server.wait()
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
                logging.debug("visdom: %s", error)
                self._client = self._drawn = None  # as new, when the server is back
                ended = self.server is None or self.server.poll() is not None
                if closing and (ended or time.monotonic() > self._give_up):
                    return
                time.sleep(0.2)

    def _draw(self):
        if self._client is None:
            if self.server is None and not listening(self.port):  # it was another run's, and ended with it
                self.server = start_server(self.port)
            logging.getLogger("visdom").setLevel(logging.CRITICAL)
            self._client = visdom.Visdom(
                address(self.port).rsplit(":", 1)[0],
                port=self.port,
                env=self.name,
                use_incoming_socket=False,
                raise_exceptions=True,
            )
        losses = list(self.history["loss"])
        rates = self.history["rate"][: len(losses)]  # the run may have appended since
        epochs = list(self.history["epochs"])
        now = (len(losses), len(epochs), self.status)
        if now == self._drawn:
            return
        step = max(1, len(losses) // 2000)  # enough points for any screen
        iterations = list(range(1, len(losses) + 1, step))
        if losses:
            self._line("Train Loss", iterations, losses[::step], "iteration", "loss")
            self._line("Learning Rate", iterations, rates[::step], "iteration", "rate")
        if epochs:
            numbers = [row["epoch"] for row in epochs]
            for title, key in (
                ("Validation Accuracy", "test_accuracy"),
                ("Train Accuracy", "train_accuracy"),
            ):
                self._line(title, numbers, [100 * row[key] for row in epochs], "epoch", "%")
        cells = "".join(
            f"<tr><td><b>{html.escape(key)}</b>&emsp;</td><td>{html.escape(str(value))}</td></tr>"
            for key, value in {"status": self.status, **self.settings}.items()
        )
        self._client.text(f"<table>{cells}</table>", win="Run", opts=dict(title="Run"))
        self._drawn = now

    def _line(self, title, x, y, xlabel, ylabel):
        opts = dict(title=title, xlabel=xlabel, ylabel=ylabel, width=520, height=340)
        if len(x) < 100:
            opts.update(markers=True, markersize=5)
        self._client.line(Y=y, X=x, win=title, opts=opts)


def serve(port):
    """Runs the visdom server in this process, on 127.0.0.1 only, until it is interrupted."""
    from visdom.server.build import download_scripts
    from visdom.server.run_server import start_server as run

    # The page's JavaScript comes from the web at the first start. Offline that may hang or raise.
    def download():
        try:
            download_scripts()
        except Exception as error:
            print(f"the page stays empty: its scripts could not be downloaded ({error})")

    threading.Thread(target=download, daemon=True).start()
    PAGES.mkdir(parents=True, exist_ok=True)
    run(port, "127.0.0.1", base_url="", env_path=f"{PAGES}/", bind_local=True)


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--port", type=cli.number(int, 1, 65535), default=PORT, help=f"default: {PORT}")
    args = parser.parse_args(argv)
    if listening(args.port):
        print(f"a visdom server is there already: {address(args.port)}")
        return
    serve(args.port)


if __name__ == "__main__":
    main()
