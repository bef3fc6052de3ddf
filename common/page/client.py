"""Talking to the visdom server: starting and ending it, connecting, drawing panes. visdom is only imported
where it is needed: it takes a second, and may not be installed."""

import base64
import contextlib
import http.client
import io
import json
import logging
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import UserError, make_folder

# A proxy is for the web, not for this machine.
for variable in ("NO_PROXY", "no_proxy"):
    os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1"]))

PAGES = Path("runs/visdom")  # where the server keeps what the pages show


def address(port):
    """Where the page is."""
    return f"http://127.0.0.1:{port}"


def is_listening(port):
    """Whether a visdom server listens on `port`. Raises `UserError` if something else does."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=3):
            pass
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # the request below says what is wrong
    request = urllib.request.Request(f"{address(port)}/env_state", b"{}")
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            if isinstance(json.load(answer), list):  # the names of its pages
                return True
    except (OSError, http.client.HTTPException, ValueError):  # no answer in time, not HTTP, or not JSON
        pass
    way_out = "--port takes a free one, --no-visdom does without"
    raise UserError(f"port {port} is used by another program: {way_out}")


def start_server(port):
    """Starts a visdom server for this machine only, as a process of its own; returns the process."""
    # -P: common/page/ is not on its path. Ctrl-C is for the run, which ends the server itself.
    command = [sys.executable, "-P", Path(__file__).with_name("server.py"), str(port), PAGES]
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(command, start_new_session=True, **silent)


def stop_server(process):
    """Ends what `start_server` returned; None is no server."""
    if process:
        process.terminate()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:  # it hangs
            process.kill()
            process.wait()


def connect(port, environment, events=False):
    """A client of the server on `port`, for one environment. Raises ConnectionError."""
    import visdom

    class Client(visdom.Visdom):
        """A server that hangs makes visdom's own client wait for ever, and that of 0.3 leaves a thread."""

        def _start_session_reaper(self):
            pass

        def _handle_post(self, url, data=None):
            answer = self.session.post(url, data=data or {}, timeout=5)
            answer.raise_for_status()
            return answer.text

    logging.getLogger("visdom").setLevel(logging.CRITICAL)
    options = dict(use_incoming_socket=events, raise_exceptions=True)
    return Client("http://127.0.0.1", port=port, env=environment, **options)


def has_pane(client, title):
    """Whether the server shows that pane. Raises ConnectionError. (`win_exists` prints when the server is
    gone.)"""
    request = dict(win=title, eid=client.env)
    return client._send(request, endpoint="win_exists", quiet=True) == "true"


def draw(client, title, traces, x="", y="", size=(400, 335), **layout):
    """A pane of plotly traces, called `title`. Sent as visdom's manual says for what its own `line`, `bar`
    and `heatmap` cannot do: a second axis, one column in another colour, a text under the pointer."""
    legend = len(traces) > 1
    layout = dict(margin=dict(l=52, r=14, t=30 if legend else 10, b=40), showlegend=legend) | layout
    layout["legend"] = dict(orientation="h", x=0, y=1, yanchor="bottom", bgcolor="rgba(0, 0, 0, 0)")
    for axis, text in (("xaxis", x), ("yaxis", y)):
        layout[axis] = dict(title=text) | layout.get(axis, {})
    opts = dict(title=title, width=size[0], height=size[1])
    client._send(dict(data=traces, layout=layout, win=title, eid=client.env, opts=opts))


def draw_bars(client, title, values, marked, label, size, **layout):
    """A column chart of `values` [N], one of which is `marked`; it tells map and value under the pointer."""
    colors = ["#e4572e" if i == marked else "#4c78a8" for i in range(len(values))]
    hover = "map %{x}: %{y:.4f}<extra></extra>"
    trace = dict(type="bar", y=values.tolist(), hovertemplate=hover, marker=dict(color=colors))
    draw(client, title, [trace], "feature map", label, size, **layout)


def png(image):
    """An image, uint8 [3, H, W], as the source of an HTML image."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def save_figure(figure, args, name, bars=None):
    """Writes the figure to the folder --out, prints its path and, if a page is open on --port, shows it
    there, in the environment "figures": as it is, or by `draw_bars` from `bars` (title, values [N], label).
    Raises `UserError` if it cannot be written."""
    path = make_folder(args.out) / name
    try:
        figure.savefig(path, dpi=90, pil_kwargs=dict(optimize=True))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another folder with --out")
    print(path)
    with contextlib.suppress(UserError, ConnectionError, ImportError):  # the file is what counts
        if not is_listening(args.port):
            return
        client = connect(args.port, "figures")
        if bars:
            title, values, label = bars
            draw_bars(client, title, values, int(values.argmax()), label, (620, 300))
        else:
            image = np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)
            opts = dict(title=name, width=620, height=round(620 * image.shape[1] / image.shape[2]) + 25)
            client.image(image, win=name, opts=opts)
        client.save(["figures"])
