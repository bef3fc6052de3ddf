"""The front page, visdom's environment "main": the runs, the figures, the explorer, and how to get more."""

import contextlib
import html
import json
import re
import time
from urllib.parse import quote

from common.cli import port_flag

TIME = "%Y-%m-%d %H:%M:%S"  # the form of a time in the pane "Run"
SILENT = 60  # seconds without a change, after which a run that says "running" is called interrupted
COMMANDS = {
    "python train.py": "train ResNet-18 on CIFAR-10, with live curves here",
    "python train.py --dataset digits": "the same on scikit-learn's digits, in minutes and with no download",
    "python Myvisdom.py --explore": "look inside a network by clicking, here; --image FILE adds a photograph",
    "python test_filter.py": "the filters of conv1",
    "python test_featuremaps.py": "the feature maps of an image",
    "python test_activations.py": "how strongly each map responds",
    "python test_recon_conv1.py": "the pattern that a map of conv1 responded to",
    "python test_recon_conv5.py": "the pattern that a map of conv5_x responded to",
}
LINKS = dict(explore="the explorer: look inside a network by clicking", figures="the figures that were drawn")
STYLE = "<div style='font-size:14px;line-height:1.75;padding:4px 10px'>"


def draw(client):
    """Draws the front page anew and saves it; `client` is connected to the server. Returns the names of the
    runs, the newest first. Raises ConnectionError."""
    pages, runs = client.get_env_list(), {}
    for name in pages:
        with contextlib.suppress(ConnectionError, ValueError, TypeError, KeyError):  # no run's, or damaged
            content = json.loads(client.get_window_data("Run", name))["content"]
            runs[name] = dict(re.findall(r"<b>(.*?)</b>.*?<td>(.*?)</td>", content))
    names = sorted(runs, key=lambda name: (_start(name), name), reverse=True)
    port = port_flag(client.port)
    client.text(_runs_table(runs, names, port), "Runs", "main", dict(title="Runs", width=760, height=690))
    there = [
        f"<a href='/env/{name}'><b>{name}</b></a>&emsp;{text}"
        for name, text in LINKS.items()
        if name in pages
    ]
    lines = [f"<code>{command}{port}</code><br>&emsp;{text}" for command, text in COMMANDS.items()]
    text = f"{STYLE}{'<br>'.join(there)}<h4>What to type in a terminal</h4>{'<br>'.join(lines)}</div>"
    client.text(text, "Look inside", "main", dict(title="Look inside", width=480, height=690))
    client.save(["main"])
    return names


def _start(name):
    """When the run of that name began, from the name: "2026-11-26 09:30", or nothing."""
    found = re.search(r"_(\d{4}-\d\d-\d\d)_(\d\d)-(\d\d)-\d\d$", name)
    return "{} {}:{}".format(*found.groups()) if found else ""


def _runs_table(runs, names, port):
    """The runs as HTML, in the order of `names`; or what to type where there are none."""
    if not names:
        return f"{STYLE}No run yet. <code>{next(iter(COMMANDS))}{port}</code> starts one.</div>"
    rows = []
    for name in names:
        run, link = runs[name], f"<a href='/env/{quote(name)}'><b>{html.escape(name)}</b></a>"
        state = run.get("state", "")
        with contextlib.suppress(ValueError):
            drawn = time.mktime(time.strptime(run.get("drawn", ""), TIME))
            if state == "running" and time.time() - drawn > SILENT:
                state = "interrupted"
        cells = link, run.get("dataset", ""), state, run.get("best validation accuracy", ""), _start(name)
        rows.append(cells)
    heads = "run", "data set", "state", "best accuracy", "begun"
    lines = ("".join(f"<td style='padding-right:20px'>{cell}</td>" for cell in row) for row in (heads, *rows))
    return f"{STYLE}<table><tr>{'</tr><tr>'.join(lines)}</tr></table></div>"
