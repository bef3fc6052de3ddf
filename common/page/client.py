"""Talking to the visdom server. visdom is imported where needed: it takes a second, and may be missing."""

import contextlib
import http.client
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from common import figures
from common.checkpoint import atomic_write
from common.cli import UserError, make_folder, port_flag, print_last
from common.page import front
from common.page.tiles import tile

# A proxy is for the web, not for this machine. What Windows and macOS know of proxies is forgotten once the
# environment says anything about them, so that goes there first.
for scheme, proxy in urllib.request.getproxies().items():
    os.environ.setdefault(f"{scheme}_proxy", proxy)
for variable in ("NO_PROXY", "no_proxy"):
    if os.environ.get(variable) != "*":  # which means every host, but only by itself
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1"]))

PAGES = "runs/visdom"  # where the server keeps what the pages show
TIMEOUT = 10  # seconds in which a server answers, also on a machine that is busy


def address(port):
    """Where the page is."""
    return f"http://127.0.0.1:{port}"


def is_listening(port):
    """Whether a visdom server listens on `port`. Raises `UserError` if something else does."""
    try:
        with urllib.request.urlopen(f"{address(port)}/env_state", b"{}", timeout=TIMEOUT) as answer:
            if isinstance(json.load(answer), list):  # the names of its pages
                return True
    except (OSError, http.client.HTTPException, ValueError) as error:  # not in time, not HTTP, or not JSON
        if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
            return False
    raise UserError(f"port {port} is used by another program: choose another --port")


def is_explorer_open(port):
    """Whether an explorer answers the clicks on its page, on our server on `port`."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        with urllib.request.urlopen(f"{address(port)}/env/explore?is_open=1", timeout=TIMEOUT) as answer:
            return answer.read(9) == b"True"
    return False


def start_server(port):
    """Starts a visdom server for this machine only, as a process of its own; returns the process."""
    # -P: common/page/ is not on its path. Ctrl-C is for the run, which ends the server itself.
    command = [sys.executable, "-P", Path(__file__).with_name("server.py"), str(port), PAGES]
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    alone = dict(start_new_session=True)
    if sys.platform == "win32":  # which has no sessions
        alone = dict(creationflags=subprocess.CREATE_NEW_PROCESS_GROUP)
    return subprocess.Popen(command, **alone, **silent)


def stop_server(process):
    """Ends what `start_server` returned; None is no server."""
    if process:
        process.kill()  # it may hang, and has nothing to tidy up
        process.wait()


def connect(port, env, events=False):
    """A client of the server on `port`, for one environment. Raises ConnectionError."""
    from common.page.server import visdom

    class Client(visdom.Visdom):
        """visdom's client with a time limit, since its own waits for ever on a server that hangs, and without
        the thread that visdom 0.3 leaves behind."""

        def _start_session_reaper(self):
            pass

        def _handle_post(self, url, data=None):
            answer = self.session.post(url, data=data or {}, timeout=TIMEOUT)
            answer.raise_for_status()
            return answer.text

        def get_env_list(self):
            """The names of the pages: visdom 0.3's own asks for the panes of one of them."""
            try:
                return json.loads(self._handle_post(f"{address(port)}/env_state", "{}"))
            except OSError as error:  # those of requests are no ConnectionError
                raise ConnectionError(error)

        def save(self, envs):
            with contextlib.suppress(ConnectionError):  # on a full disk the pages are there all the same
                super().save(envs)

    logging.getLogger("visdom").setLevel(logging.CRITICAL)
    return Client("http://127.0.0.1", port=port, env=env, use_incoming_socket=events, raise_exceptions=True)


def draw(client, title, traces, x="", y="", size=(400, 335), win=None, **layout):
    """A pane of plotly traces, called `title`: visdom's own `bar` and `heatmap` lack what ours need. `win`
    is the pane's name, for one whose title changes."""
    legend = len(traces) > 1
    layout = dict(margin=dict(l=52, r=14, t=30 if legend else 10, b=40), showlegend=legend) | layout
    layout["legend"] = dict(orientation="h", x=0, y=1, yanchor="bottom", bgcolor="rgba(0, 0, 0, 0)")
    for axis, text in (("xaxis", x), ("yaxis", y)):
        layout[axis] = dict(title=text) | layout.get(axis, {})
    message = dict(data=traces, layout=layout, win=win or title, eid=client.env)
    message["opts"] = dict(title=title, width=size[0], height=size[1])
    client._send(message | dict(version=time.time()))  # visdom 0.3 draws again only what has another version


def draw_bars(client, title, values, label, marked, size, **layout):
    """A column chart of `values` [N], one of which is `marked`; it tells map and value under the pointer."""
    colors = ["#e4572e" if i == marked else "#4c78a8" for i in range(len(values))]
    hover = "map %{x}: %{y:.4f}<extra></extra>"
    trace = dict(type="bar", y=values.tolist(), hovertemplate=hover, marker=dict(color=colors))
    draw(client, title, [trace], "feature map", label, size, **layout)


def draw_images(client, win, images, captions, side, font, links=None, **opts):
    """A pane of images, each as a `tile`; `links` are the addresses that they lead to."""
    tiles = [tile(image, caption, side, font) for image, caption in zip(images, captions)]
    if links:
        tiles = [f"<a href='{link}' target='explore'>{image}</a>" for link, image in zip(links, tiles)]
    client.text("".join(tiles), win=win, opts=dict(title=win) | opts)


def save_figure(figure, args, name, bars=None):
    """Writes the figure to the folder --out, prints its path and shows it on an open page on --port:
    as it is, or by `draw_bars` from `bars` (title, values [N], label). Raises `UserError`."""
    path, image = make_folder(args.out) / name, Path(getattr(args, "image", None) or "")
    if path.exists() and image.is_file() and path.samefile(image):
        raise UserError(
            f"{path} is the image that --image names, and would be overwritten: name another --out"
        )
    with atomic_write(path) as file:
        file.write(figures.png(figure))
    print(path)
    with contextlib.suppress(UserError, ConnectionError, ImportError):  # the file is what counts
        if not is_listening(args.port):
            command = f"python Myvisdom.py{port_flag(args.port)}"
            print_last(f"to see them in a browser: start {command} in another terminal, then repeat this")
            return
        client = connect(args.port, "figures")
        if bars:
            draw_bars(client, *bars, int(bars[1].argmax()), (620, 300))
        else:
            image = np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)
            opts = dict(title=name, width=620, height=round(620 * image.shape[1] / image.shape[2]) + 25)
            client.image(image, win=name, opts=opts)
        client.save(["figures"])
        front.draw(client)
        print_last(f"on the page: {address(args.port)}/env/figures")
