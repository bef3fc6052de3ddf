"""The live page, with the real visdom server."""

import base64
import html
import http.server
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import Myvisdom
import test_activations
import test_filter
import train
from common import data, inside, responses
from common.cli import UserError
from common.network import load_network
from common.page import assets, choices, client, explorer, front
from common.page import server as page_server
from common.page.server import visdom
from MyResnet import ResNet18

LIMIT = 600  # seconds: no wait is a guess, each ends when what it waits for is there
ROW = dict(epoch=1, train_accuracy=0.5, test_accuracy=0.25, last_size_accuracy=None)


@pytest.fixture
def port(monkeypatch, free_port):
    """A free port; no server that a page starts outlives the test, whatever happens in it."""
    servers, start = [], client.start_server
    monkeypatch.setattr(client, "start_server", lambda port: servers.append(start(port)) or servers[-1])
    monkeypatch.setattr(Myvisdom, "PATIENCE", LIMIT)
    yield free_port
    for server in servers:
        server.kill()
        server.wait()


def wait_for(condition):
    """What `condition` returns once that is true."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        try:
            if result := condition():
                return result
        except (OSError, ValueError, KeyError, UserError):  # not there yet
            pass
        time.sleep(0.2)
    pytest.fail(f"not within {LIMIT} s")


def panes(port, env):
    client = visdom.Visdom(
        "http://127.0.0.1", port=port, env=env, use_incoming_socket=False, raise_exceptions=True
    )
    return json.loads(client.get_window_data(env=env))


def points(pane, trace=0):
    return list(zip(pane["content"]["data"][trace]["x"], pane["content"]["data"][trace]["y"]))


def make(port, name="mine", loss=(2.0, 1.0), **more):
    """A page and the history that it draws."""
    count = len(loss)
    history = dict(loss=list(loss), rate=[0.1] * count, clock=[0.5 * i for i in range(count)], epochs=[])
    settings = dict(name=name, recipe="<b>fast", sizes=[32, 64], epochs=2, batch_size=10) | more
    return Myvisdom.Page(history, settings, ["cat", "dog"], 3, port), history


def add(history, loss, rate):
    history["rate"].append(rate), history["clock"].append(history["clock"][-1] + 0.5)
    history["loss"].append(loss)


def test_page_draws_what_the_run_appends_and_ends_with_it(port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, history = make(port)
    with page:
        drawn = wait_for(lambda: (now := panes(port, "mine")) and "Run" in now and now)
        assert points(drawn["Train Loss"]) == [(1, 2), (2, 1)]
        assert points(drawn["Learning Rate and Speed"]) == [(1, 0.1), (2, 0.1)]
        assert "&lt;b&gt;fast" in drawn["Run"]["content"] and "running" in drawn["Run"]["content"]

        add(history, 0.5, 0.3)  # evaluated now
        wait_for(lambda: "3 of 3" in (now := panes(port, "mine"))["Run"]["content"] and "1 of 2" in str(now))
        add(history, 0.4, 0.3)
        history["epochs"].append(ROW)
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        logits = torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 3.0], [5.0, 0.0]])
        page.evaluation = images, torch.tensor([0, 0, 0, 1]), logits
        drawn = wait_for(lambda: (now := panes(port, "mine")) and "Mistakes" in now and now)
        assert capsys.readouterr().out.count(f"http://127.0.0.1:{port}/env/mine") == 1
        assert points(drawn["Train Loss"]) == [(1, 2), (2, 1), (3, 0.5), (4, 0.4)]
        assert "2 of 2" in drawn["Run"]["content"] and "1 of 3" in drawn["Run"]["content"]  # epoch, step
        assert points(drawn["Validation Accuracy"]) == [(1, 25)]
        assert points(drawn["Validation Accuracy"], 1) == [(1, 50)]
        assert points(drawn["Learning Rate and Speed"], 1) == [(1, 32), (2, 32), (3, 32), (4, 64)]  # px
        speeds = [y for _, y in points(drawn["Learning Rate and Speed"], 2)]
        assert speeds == pytest.approx([10 / 0.5] * 3)
        assert drawn["Confusion"]["content"]["data"][0]["z"] == [[1, 2], [1, 0]]
        mistakes = drawn["Mistakes"]["content"]
        assert mistakes.count("<img") == 3 and mistakes.index("cat 99%") < mistakes.index("dog 95%")
        links = re.findall(r"<a href='/env/explore\?(.*?)'.*?image (\d):<br>(...)", mistakes)
        assert [link[1:] for link in links] == [("3", "cat"), ("2", "dog"), ("1", "dog")]
        assert all(link.endswith(f"image={number}") for link, number, _ in links)

        if sys.platform == "linux":  # it listens on 127.0.0.1 and nowhere else
            sockets = [line.split() for file in Path("/proc/net").glob("tcp*") for line in open(file)]
            listening = [fields[1] for fields in sockets if fields[3] == "0A"]
            assert [a for a in listening if a.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    assert page.server.poll() is not None and not client.is_listening(port)


def test_saved_page_is_served_again(port, page_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, history = make(port)
    with page:
        history["epochs"] += [ROW, ROW]
    again = subprocess.Popen([sys.executable, Path(Myvisdom.__file__), "--port", str(port)])
    try:
        drawn = wait_for(lambda: panes(port, "mine"))
        assert len(points(drawn["Train Loss"])) == 2 and "finished" in drawn["Run"]["content"]
        assert Myvisdom.main(["--port", str(port)]) is None  # says that it is there already
        page, _ = make(port, "other")
        with page:
            assert page.server is None  # this one is not the page's to end
        assert client.is_listening(port)
    finally:
        again.kill()
        again.wait()


def test_server_that_dies_comes_back_with_everything(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, history = make(port, loss=[2.0])
    with page:
        wait_for(lambda: panes(port, "mine"))
        first = page.server
        first.kill()
        first.wait()
        add(history, 0.5, 0.3)
        wait_for(lambda: points(panes(port, "mine")["Train Loss"]) == [(1, 2), (2, 0.5)])
        assert page.server is not first
    assert not page._thread.is_alive() and not client.is_listening(port)


@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be stopped there")
def test_server_that_hangs_holds_nothing_up(port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, history = make(port, loss=[2.0])
    page.__enter__()
    wait_for(lambda: page._announced)
    monkeypatch.setattr(client, "TIMEOUT", 1)
    os.kill(page.server.pid, signal.SIGSTOP)
    for _ in range(100):
        add(history, 1.0, 0.1)  # as a run does
    wait_for(lambda: page._client is None)  # a draw has hung
    page.__exit__(None, None, None)
    assert not page._thread.is_alive()
    assert page.server.poll() is not None  # nothing is left behind


def test_server_of_a_killed_run_is_used_by_the_next(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed = f"""
import os, sys, time
sys.path[:0] = [{str(Path(Myvisdom.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import Myvisdom, test_visdom
from common.page import client
page, _ = test_visdom.make({port})
page.__enter__()
while not client.is_listening({port}): time.sleep(0.1)
print(page.server.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    result = subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, text=True)
    server = int(result.stdout.split()[-1])
    try:
        assert client.is_listening(port)
        page, _ = make(port, "next", loss=[3.0])
        with page:
            assert page.server is None
            drawn = wait_for(lambda: panes(port, "next"))
            assert points(drawn["Train Loss"]) == [(1, 3)]
    finally:
        os.kill(server, signal.SIGKILL)


def downloads(static):
    """{file below static/: its address} of what the installed visdom would download."""
    from visdom.server import build  # after common.page.server, which imports it in its own way

    def opened(what):  # an address, or a request for one: what is "downloaded" is the address itself
        address = getattr(what, "full_url", what).encode()
        return SimpleNamespace(read=lambda: address, content=address)

    with (
        mock.patch.object(urllib.request, "build_opener", lambda *handlers: SimpleNamespace(open=opened)),
        mock.patch.object(urllib.request, "install_opener"),
        mock.patch.object(requests, "get", opened),
        mock.patch.object(build, "print", create=True),
    ):
        build.download_scripts(install_dir=static.parent)
    files = [path for path in static.rglob("*") if path.is_file() and path.name != "version.built"]
    return {path.relative_to(static).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_files_are_those_that_visdom_would_download(tmp_path):
    addresses, sources = downloads(tmp_path / "static"), assets.sources()
    assert sources.keys() == addresses.keys()
    for file, address in addresses.items():
        package, version, path = re.fullmatch(r"([\w.-]+)@([\d.]+)/(.+)", sources[file]).groups()
        if "unpkg.com" in address:
            expected = address.removeprefix("https://unpkg.com/").partition("#")[0]
            assert sources[file] in (expected, f"{expected}/index.js")
        elif "mathjax" in address:
            assert package == "mathjax" and f"/mathjax/{version}/{path}" in address
        else:  # plotly and d3, on hosts of their own
            name, number = re.search(r"/(plotly|d3[a-z-]*?)[-.]v?(\d[\d.]*?)(\.min)?\.js", address).groups()[
                :2
            ]
            assert package in (name, f"{name}.js-dist-min") and f"{version}.".startswith(f"{number}.")


def test_files_are_whole_and_of_the_installed_visdom(tmp_path, monkeypatch, capsys):
    index = (assets.STATIC / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r"js/[\w./-]+\.js", index):
        assert name in assets.sources() or (assets.STATIC / name).exists(), name

    monkeypatch.setattr(assets, "STATIC", tmp_path)
    assert assets.missing() == assets.sources()
    monkeypatch.setattr(assets, "from_web", lambda files: {path: b"1234" for path in files})
    assets.ensure()
    assert assets.missing() == {}
    (tmp_path / "js/jquery.min.js").write_bytes(b"12")  # not whole
    (tmp_path / "js/main.js").unlink(missing_ok=True)
    assert list(assets.missing()) == ["js/jquery.min.js"]
    monkeypatch.setattr(visdom, "__version__", "9.9")
    assert assets.missing().keys() == assets.sources().keys()


def test_without_web_and_npm_one_line_says_so_and_training_goes_on(port, tmp_path, monkeypatch, capsys):
    def no(files):
        raise OSError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "STATIC", tmp_path / "static")
    monkeypatch.setattr(assets, "from_web", no)
    monkeypatch.setattr(assets, "from_npm", no)
    page, _ = make(port)
    with page:
        wait_for(lambda: panes(port, "mine"))
        assert page.starts == 0  # none but the first
    printed = capsys.readouterr().out
    assert "visdom's page will be blank: neither the web nor npm" in printed and "install npm" in printed
    assert (
        len(
            points(
                json.loads((tmp_path / "runs/visdom/mine.json").read_text(encoding="utf-8"))["jsons"][
                    "Train Loss"
                ]
            )
        )
        == 2
    )


def test_a_server_that_cannot_start_is_tried_few_times(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    starts, attempts, fails = [], [], [sys.executable, "-S", "-c", "exit(1)"]
    monkeypatch.setattr(client, "start_server", lambda p: starts.append(p) or subprocess.Popen(fails))
    monkeypatch.setattr(client, "connect", lambda *args: attempts.append(len(starts)) or 1 / 0)
    page, history = make(port)
    with page:
        wait_for(lambda: attempts[-3:] == [4, 4, 4])
    assert len(starts) == 4


def test_figures_are_shown_on_an_open_page(port, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--port", str(port)]
    test_filter.main(flags)  # no page is open
    page, _ = make(port)
    with page:
        wait_for(lambda: panes(port, "mine"))
        test_filter.main(flags)
        test_activations.main(flags)
        drawn = panes(port, "figures")
    assert sum(pane["type"] == "image" for pane in drawn.values()) == 4
    bars = [pane["content"]["data"][0] for pane in drawn.values() if pane["type"] == "plot"]
    assert sorted(len(trace["y"]) for trace in bars) == [64, 512]
    assert all(trace["type"] == "bar" and "map %{x}" in trace["hovertemplate"] for trace in bars)


def test_port_of_another_program_is_refused(port, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()  # and never answers
        monkeypatch.setattr(client, "TIMEOUT", 1)
        with pytest.raises(
            UserError, match=f"port {port} is used by another program: choose another --port$"
        ):
            client.is_listening(port)


def test_server_that_another_has_replaced_is_told_everything(port, tmp_path, monkeypatch):
    """Between two draws, when nothing new is to be drawn."""
    monkeypatch.chdir(tmp_path)
    first, servers = client.start_server(port), []
    wait_for(lambda: client.is_listening(port))
    page, history = make(port, loss=[2.0])
    with page:
        history["epochs"].append(ROW)
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        page.evaluation = images, torch.tensor([0, 1]), torch.eye(2)
        wait_for(lambda: "Mistakes" in panes(port, "mine"))
        wait_for(lambda: page._drawn_evaluation is not None)
        client.stop_server(first)
        (tmp_path / "runs/visdom/mine.json").unlink(missing_ok=True)
        servers.append(client.start_server(port))
        drawn = wait_for(lambda: (now := panes(port, "mine")) and "Mistakes" in now and now)
        assert {"Train Loss", "Validation Accuracy", "Confusion", "Run"} <= drawn.keys()


def test_signal_ends_the_page_with_the_run(port, tmp_path, monkeypatch, small_network):
    monkeypatch.chdir(tmp_path)
    steps, real = [], data.augment

    def augment(images, batch):
        steps.append(1)
        if len(steps) == 2:
            wait_for(lambda: client.is_listening(port))
            signal.raise_signal(signal.SIGINT)
        return real(images, batch)

    monkeypatch.setattr(data, "augment", augment)
    before = set(threading.enumerate())
    flags = "--dataset digits --limit 128 --batch-size 32 --epochs 9 --size 32 --device cpu --precision fp32"
    assert train.main([*flags.split(), "--port", str(port)]) == 130
    assert len(steps) == 2 and not client.is_listening(port)
    assert not [t for t in set(threading.enumerate()) - before if "tqdm" not in type(t).__module__]
    assert not list(tmp_path.rglob("*.tmp"))
    (file,) = (tmp_path / "runs/visdom").glob("digits_*.json")
    assert "stopped" in json.loads(file.read_text(encoding="utf-8"))["jsons"]["Run"]["content"]


def test_training_goes_on_where_visdom_is_not_installed(
    free_port, tmp_path, monkeypatch, capsys, small_network
):
    for name in ("Myvisdom", "common.page.assets", "common.page.server"):
        monkeypatch.delitem(sys.modules, name)
    for name in ("assets", "server"):
        monkeypatch.delattr(f"common.page.{name}")
    monkeypatch.setitem(sys.modules, "visdom", None)
    flags = "--dataset digits --limit 64 --epochs 1 --size 32 --device cpu --precision fp32"
    assert not train.main([*flags.split(), "--out", str(tmp_path)])
    assert "no live page, since visdom is not installed: pip install -r" in capsys.readouterr().out
    monkeypatch.setattr(client, "TIMEOUT", 1)  # second; each figure asks a program that never answers
    with socket.create_server(("127.0.0.1", free_port)):
        test_filter.main(["--port", str(free_port), "--out", str(tmp_path)])
    assert f"{tmp_path}/filters_rgb.png" in capsys.readouterr().out


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers "hello" and the path, or drips for ever."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"hello {self.path}".encode())
        while self.path == "/drip":
            self.wfile.write(b".")
            time.sleep(0.1)

    def log_message(self, *args):
        pass


def test_files_come_from_the_web_in_time_or_not_at_all(free_port, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(assets, "CDN", f"http://127.0.0.1:{free_port}")
    found = assets.within(LIMIT, assets.from_web, {"a.js": "one@1.1/a", "b.js": "one@1.1/b"})
    assert found == {"a.js": b"hello /one@1.1/a", "b.js": b"hello /one@1.1/b"}
    assert assets.within(1, assets.from_web, {"a.js": "drip"}) is None  # or else it would go on for ever
    server.shutdown()
    server.server_close()


def test_files_come_out_of_npm_packages(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text(f"""#!{sys.executable}
import io, json, sys, tarfile
packages = sys.argv[sys.argv.index("--fetch-retries=0") + 1 :]
for i, name in enumerate(packages):
    with tarfile.open(f"{{i}}.tgz", "w:gz") as archive:
        for path in ("dist/a.js", "b.css"):
            member = tarfile.TarInfo("package/" + path)
            member.size = len(content := (name + path).encode())
            archive.addfile(member, io.BytesIO(content))
print(json.dumps([dict(filename=f"{{i}}.tgz") for i in range(len(packages))]))
""")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    files = {
        "js/x.js": "two@2.0/dist/a.js",
        "css/y.css": "one@1.1/b.css",
    }
    expected = {"js/x.js": b"two@2.0dist/a.js", "css/y.css": b"one@1.1b.css"}
    assert assets.from_npm(files) == expected


def test_training_draws_its_page(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--dataset digits --recipe standard --limit 100 --epochs 1 --size 32 --device cpu --precision fp32"
    )
    assert not train.main([*flags.split(), "--port", str(port)])
    (file,) = (tmp_path / "runs/visdom").glob("digits_*.json")  # with the time it began
    saved = json.loads(file.read_text(encoding="utf-8"))["jsons"]
    assert len(points(saved["Train Loss"])) == len(points(saved["Validation Accuracy"])) == 1
    (raw, mean), accuracies = (
        saved[pane]["content"]["data"] for pane in ("Train Loss", "Validation Accuracy")
    )
    assert raw["mode"] == mean["mode"] == "markers"  # a line of one point is not seen
    assert [trace["name"] for trace in accuracies] == ["validation", "training"]  # there is one size
    assert "All 64" in saved["Filters"]["content"]
    assert "weights=runs%2Fdigits%2Fweights.pt&dataset=digits&data=data" in saved["Mistakes"]["content"]
    assert "finished" in saved["Run"]["content"] and "recipe" in saved["Run"]["content"]
    told = re.search(r"batch_size</b>&ensp;</td><td>(\d+)<", saved["Run"]["content"])
    assert told[1] == "100"  # all there are, not 128
    assert not client.is_listening(port)


def test_front_page_lists_runs_newest_first(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    servers = [client.start_server(port)]
    wait_for(lambda: client.is_listening(port))
    for name in "b_2026-11-25_10-00-00", "a_2026-11-26_09-30-00", "z_2026-01-02_03-04-05":
        page, history = make(port, name, dataset="digits")
        with page:
            history["epochs"] += [ROW, ROW]
    connection = client.connect(port, "main")
    old = json.loads(connection.get_window_data("Run", "z_2026-01-02_03-04-05"))["content"]
    old = re.sub(
        r"finished", "running", re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-01-02 03:05:00", old)
    )
    connection.text(old, "Run", "z_2026-01-02_03-04-05")
    connection.text("of another program", env="<b>other")
    names = front.draw(connection)
    assert names == ["a_2026-11-26_09-30-00", "b_2026-11-25_10-00-00", "z_2026-01-02_03-04-05"]
    rows = re.findall("<tr>(.*?)</tr>", panes(port, "main")["Runs"]["content"])
    cells = [re.findall("<td.*?>(.*?)</td>", row) for row in rows[1:]]
    assert [row[1:] for row in cells] == [
        ["digits", "finished", "25.00%", "2026-11-26 09:30"],
        ["digits", "finished", "25.00%", "2026-11-25 10:00"],
        ["digits", "interrupted", "25.00%", "2026-01-02 03:04"],
    ]
    assert "href='/env/a_2026-11-26_09-30-00'" in cells[0][0] and "other" not in str(rows)
    client.stop_server(servers[0])

    saved = tmp_path / "runs/visdom"
    (saved / "a_2026-11-26_09-30-00.json").write_text(
        '{"jsons": {"Run": {"cont', encoding="utf-8"
    )  # killed as it was saved
    (saved / "main.json").write_text("", encoding="utf-8")
    (saved / "deep.json").write_text(100_000 * "[", encoding="utf-8")
    (saved / "folder.json").mkdir()
    (saved / "link.json").symlink_to("nowhere")
    servers.append(client.start_server(port))
    wait_for(lambda: client.is_listening(port))
    assert front.draw(client.connect(port, "main")) == names[1:]
    damaged = {path.stem for path in saved.glob("*.damaged")}
    assert damaged == {"a_2026-11-26_09-30-00", "main", "deep", "folder", "link"}
    page, _ = make(port, "a_2026-11-26_09-30-00")
    with page:  # resumed
        wait_for(lambda: "Train Loss" in panes(port, "a_2026-11-26_09-30-00"))


def test_run_that_is_killed_with_its_server_has_left_its_page(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, history = make(port)
    with page:
        saved = tmp_path / "runs/visdom/mine.json"
        wait_for(lambda: "Run" in json.loads(saved.read_text(encoding="utf-8"))["jsons"])
        history["epochs"].append(ROW)
        page.evaluation = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), torch.eye(2)
        wait_for(lambda: "Validation Accuracy" in json.loads(saved.read_text(encoding="utf-8"))["jsons"])


def test_last_line_of_a_figure_script_says_where_its_figures_are(port, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--port", str(port)]
    test_filter.main(flags)
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("to see them in a browser: start python Myvisdom.py")
    )
    page, _ = make(port)
    with page:
        wait_for(lambda: panes(port, "mine"))
        test_filter.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"on the page: http://127.0.0.1:{port}/env/figures") == 1
    assert "/env/figures" in (tmp_path / "runs/visdom/main.json").read_text(encoding="utf-8")


def test_images_to_explore_are_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "create_connection", lambda *args, **options: pytest.fail("a download"))
    (tmp_path / "photos").mkdir()
    for name in "b.png", "a.jpg", "photos/b.png", "photos/note.txt", "photos/._b.png":
        Image.new("RGB", (40, 40)).save(tmp_path / name, "PNG")

    def chosen(*images):
        args = SimpleNamespace(image=images, dataset="cifar10", data="data")
        return choices.own_images(args, SimpleNamespace(classes=data.CIFAR10_CLASSES, crop=None))

    found = chosen("b.png", "photos", "a.jpg")
    assert list(found) == ["b.png", "photos/b.png", "a.jpg"] and found["a.jpg"].shape == (3, 32, 32)
    (tmp_path / "none").mkdir()
    for wrong, message in (
        ("none", "no images in the folder none"),
        ("7", "no test image 7 without CIFAR-10"),
    ):
        with pytest.raises(UserError, match=message):
            chosen(wrong)
    monkeypatch.setattr(choices, "PHOTOGRAPHS", {})  # some packages of scikit-image have none
    args = SimpleNamespace(image=[], dataset="cifar10", data="data")
    for classes, crop, side in (data.CIFAR10_CLASSES, None, 32), (["a", "b"], 64, 64):
        (image,) = choices.starting_images(args, SimpleNamespace(classes=classes, crop=crop)).values()
        assert image.shape == (3, side, side)
    assert not (tmp_path / "data").exists()


def test_explorer_answers_before_it_goes_on_in_the_background(run):
    network = load_network(run / "weights.pt", "digits", torch.device("cpu"))
    image = data.load("digits", "").test_images[0]
    explored = explorer.Explorer(network, {"one": image}, mock.MagicMock())
    begun = []
    with explored.lock:  # a click is being answered
        thread = threading.Thread(target=lambda: begun.extend(explored.track([1, 2])))
        thread.start()
        time.sleep(0.3)
        assert not begun
    thread.join(timeout=LIMIT)
    assert begun == [1, 2]
    explored.closing = True
    with pytest.raises(ConnectionError):
        next(explored.track([1]))


def test_server_starts_without_what_takes_seconds_to_import():
    code = "import sys, server; print({'visdom', 'torch', 'openTSNE', 'sklearn'} & set(sys.modules))"
    folder = Path(Myvisdom.__file__).parent / "common" / "page"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.stdout.strip() == "{'visdom'}", result.stderr


def test_server_tells_the_terminal_nothing_of_its_framework(port, page_files, tmp_path):
    command = [sys.executable, Path(Myvisdom.__file__), "--port", str(port)]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(lambda: client.is_listening(port))
        for path in "static/css/none.css", "static/../../x", "none", "env_state", "update":
            assert (
                requests.post(f"{client.address(port)}/{path}", "{not json", timeout=LIMIT).status_code >= 400
            )
            requests.get(f"{client.address(port)}/{path}", timeout=LIMIT)
    finally:
        process.kill()
        process.wait()
    told = (tmp_path / "log").read_text(encoding="utf-8")
    assert f"http://127.0.0.1:{port}" in told
    assert not re.search("error|warn|traceback|could not", told, re.IGNORECASE)


def test_folder_of_the_pages_that_cannot_be_made_is_told(port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "ensure", lambda: None)
    (tmp_path / "runs").touch()
    with pytest.raises(SystemExit):
        Myvisdom.main(["--port", str(port)])
    assert "error: cannot make the folder runs/visdom" in capsys.readouterr().err


def test_short_run_waits_for_a_server_that_starts_slowly(port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, real = make(port)[0], client.connect
    attempts = []

    def connect(*args, **options):
        attempts.append(1)
        if len(attempts) < 50:  # of a fifth of a second: longer than any limit there was
            raise ConnectionError
        return real(*args, **options)

    monkeypatch.setattr(client, "connect", connect)
    with page:
        pass
    assert "waiting for the live page" in capsys.readouterr().out
    assert (
        "Train Loss" in json.loads((tmp_path / "runs/visdom/mine.json").read_text(encoding="utf-8"))["jsons"]
    )


def test_filters_stay_when_a_run_is_resumed(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, history = make(port)
    with page:
        page.filters = torch.randn(64, 3, 7, 7), dict(conv1=0.25), 4
        wait_for(lambda: "Filters" in panes(port, "mine"))
    resumed, _ = make(port)
    with resumed:
        assert "All 64" in wait_for(lambda: panes(port, "mine")["Filters"]["content"])


def test_server_that_hangs_is_a_connection_error(monkeypatch):
    answer = SimpleNamespace(text="[]", raise_for_status=lambda: None)
    monkeypatch.setattr(requests.Session, "post", lambda *args, **options: answer)
    connected = client.connect(1, "main")
    assert connected.get_env_list() == []
    monkeypatch.setattr(requests.Session, "post", mock.Mock(side_effect=requests.ReadTimeout))
    with pytest.raises(ConnectionError):
        connected.get_env_list()
    connected.save(["main"])  # that a page is not saved ends nothing


def test_proxy_of_the_system_is_kept(monkeypatch):
    """Windows and macOS have it in their settings, which Python reads only where no variable names any."""
    for name in "NO_PROXY", "no_proxy", "https_proxy":
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    runpy.run_path(client.__file__)
    assert os.environ["https_proxy"] == "http://proxy:3128" and os.environ["no_proxy"] == "127.0.0.1"
    monkeypatch.setenv("no_proxy", "*")
    runpy.run_path(client.__file__)
    assert os.environ["no_proxy"] == "*"


def test_page_shows_the_filters_and_how_many_maps_are_silent(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ResNet18(2).eval()
    with torch.no_grad():
        for channel in range(16):
            model.conv1.bn.weight[channel], model.conv1.bn.bias[channel] = 0, -1
        filters = model.conv1.conv.weight.clone()
    page, history = make(port, mean=(0.5,) * 3, std=(0.5,) * 3, holdout=2)
    with page:
        assert "after the first epoch" in wait_for(lambda: panes(port, "mine")["Filters"]["content"])
        history["epochs"].append(ROW)
        images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        page.evaluated(model, images, torch.tensor([0, 0, 1, 1]), 9 * torch.eye(2).repeat(2, 1), 32)
        with torch.no_grad():
            model.conv1.conv.weight.zero_()  # it goes on learning: what is drawn is of the evaluation
        drawn = wait_for(lambda: (now := panes(port, "mine")) and "Mistakes" in now and now)
    content = drawn["Filters"]["content"]
    shares = re.findall(r"<b>(conv\w+)</b>.*?(\d+)%</td>", content)
    assert [name for name, _ in shares] == inside.STAGES and shares[0] == ("conv1", "25")
    png = base64.b64decode(re.search(r"base64,(.*?)'", content)[1])
    shown = np.asarray(Image.open(io.BytesIO(png))).astype(float) / 127.5 - 1
    for number in 0, 9, 63:
        top, left = (8 * n + 1 for n in divmod(number, 8))
        filter_ = (filters[number] / filters[number].abs().max()).permute(1, 2, 0).numpy()
        assert np.abs(shown[top : top + 7, left : left + 7] - filter_).max() < 0.01
    mistakes = drawn["Mistakes"]["content"]
    assert "image 1:" in mistakes and "<a " not in mistakes  # held out: not of the test set


def test_link_of_a_mistake_says_what_to_type_where_no_explorer_is_open(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client.start_server(port)
    wait_for(lambda: client.is_listening(port))

    def answer(**flags):
        return requests.get(f"{client.address(port)}/env/explore", flags, timeout=LIMIT)

    text = answer(image=43, weights="runs/my <b>run/weights.pt", dataset="digits", data="data").text
    expected = f"--explore --weights 'runs/my <b>run/weights.pt' --dataset digits --image 43 --port {port}<"
    assert expected in html.unescape(text) and "<b>" not in text
    assert (
        f"--explore --weights w.pt --image 7 --port {port}<"
        in answer(image=7, weights="w.pt", dataset="cifar10").text
    )
    other = visdom.Visdom("http://127.0.0.1", port=port, env="mine")  # of another program, and it listens
    wait_for(lambda: other.socket_alive)
    other.text("mine")
    assert f"--explore --image 8097 --port {port}<" in answer(image=8097).text
    assert f"--explore --image 7 --port {port}<" in answer(image=7).text
    other.use_socket = False  # else it goes on trying
    assert answer(image="x").url.endswith("/env/main") and answer().url.endswith("/env/main")


def test_what_to_type_on_windows_has_its_quotes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    flags = dict(weights=r"my runs\cifar10\weights.pt", image="43")
    handler = mock.Mock(sources={}, get_argument=lambda key, default: flags.get(key, default))
    handler.application.port = 8097
    page_server.open_in_explorer(handler)
    command = r'python Myvisdom.py --explore --weights "my runs\cifar10\weights.pt" --image 43<'
    assert command in html.unescape(handler.write.call_args[0][0])


def test_only_one_explorer_opens_on_a_port(port, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--explore", "--dataset", "digits", "--weights", str(run / "weights.pt"), "--port", str(port)]
    client.start_server(port)
    wait_for(lambda: client.is_listening(port))
    fields = [dict(type="button", name="or", value="a random image")]
    client.connect(port, "explore").properties(fields, win="Choose")
    assert not client.is_explorer_open(port)  # it was killed
    page = client.connect(port, "explore", events=True)
    wait_for(lambda: client.is_explorer_open(port))
    with pytest.raises(SystemExit) as stop:
        Myvisdom.main(flags)
    assert stop.value.code == 2 and f"an explorer is open on port {port}" in capsys.readouterr().err
    assert "Choose" in panes(port, "explore")
    page.use_socket = False  # else it goes on trying


@pytest.mark.parametrize("flags", [[], ["--explore", "--dataset", "digits"]])
@pytest.mark.parametrize("is_folder", [True, False])
def test_pages_that_cannot_be_kept_are_not_the_ports_fault(
    flags, is_folder, free_port, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "ensure", lambda: None)
    pages = tmp_path / client.PAGES
    pages.parent.mkdir()
    pages.mkdir() if is_folder else pages.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != client.PAGES)  # root may write anywhere
    weights = ["--weights", str(run / "weights.pt")] if flags else []
    with pytest.raises(SystemExit) as stop:
        Myvisdom.main([*flags, *weights, "--port", str(free_port)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"the folder {client.PAGES}" in said and said.endswith(": start this in another folder\n")


@pytest.fixture
def explored(run):
    """(an explorer whose page is a mock, the digits)."""
    network = load_network(run / "weights.pt", "digits", torch.device("cpu"))
    digits = data.load("digits", "")
    own = {"own.png": digits.test_images[3]}
    return explorer.Explorer(network, own, mock.MagicMock(), run / "weights.pt"), digits


def told(page, win):
    """What the pane was told, in order."""
    return [call.args[0] for call in page.text.call_args_list if call.kwargs.get("win") == win]


def test_explorer_lists_mistakes_first_and_opens_the_one_that_is_linked(explored, run):
    explored, digits = explored
    network, page = explored.network, explored.page

    def event(image, weights=run / "weights.pt"):
        return dict(event_type="Open", image=str(image), weights=str(weights), command="<code>type</code>")

    with torch.no_grad():
        logits = network.model(network.preprocess(digits.test_images))
    wrong = (logits.argmax(1) != digits.test_labels).nonzero().flatten()
    worst = int(wrong[logits.softmax(1).amax(1)[wrong].argmax()])
    explored.on_link(event(worst))  # before the test images are read
    assert explored.image == "own.png"
    explored.test_images, explored.test_labels = digits.test_images, digits.test_labels
    for index in range(5):
        explored._add_test_image(index)
    explored._open_linked()
    assert explored.image == f"test image {worst}: {digits.test_labels[worst]}"
    explored.found = responses.strongest(network, digits.test_images)
    explored._list_mistakes()
    fields = page.properties.call_args.args[0]
    names = fields[2]["values"]
    taken_for = int(logits[worst].argmax())
    assert names[:2] == ["own.png", f"{explored.image}, taken for {taken_for}"]
    count = min(len(wrong), explorer.LISTED)
    assert all(", taken for " in name for name in names[1 : 1 + count]) and fields[2]["value"] == 1
    assert not any(", taken for " in name for name in names[1 + count :])
    explored.on_property(dict(event_type="PropertyUpdate", propertyId=2, value="0"))
    assert explored.image == "own.png"
    explored.on_property(dict(event_type="PropertyUpdate", propertyId=2, value="1"))
    assert explored.image.startswith(f"test image {worst}:")

    explored.on_link(event(2, "other/weights.pt"))
    assert explored.image.startswith(f"test image {worst}:")
    assert "of another network" in told(page, "Image")[-1] and "<code>type" in told(page, "Image")[-1]
    explored.on_link(event(10**6))  # there is none
    assert explored.image.startswith(f"test image {worst}:")


@pytest.mark.parametrize("image", ["own.png", "test image 7: 1"])
def test_explorer_gives_the_exact_account_of_a_decision(explored, image):
    explored, digits = explored
    explored.images[image] = digits.test_images[7]
    explored.image = image
    explored.refresh()
    network, page = explored.network, explored.page
    logits = network.model(explored.x)[0].detach()
    first, second = logits.argsort(descending=True).tolist()[:2]
    other = 1 if image != "own.png" and first != 1 else second  # what it is, or the next best
    chart = page._send.call_args.args[0]
    assert chart["win"] == "Mean activations"
    assert chart["opts"]["title"] == (
        f"Why {first} and not {other}: what each map adds to the difference of their logits"
        f", {logits[first] - logits[other]:.2f}"
    )
    values, bias = torch.tensor(chart["data"][0]["y"]), network.model.fc.bias.detach()
    total = float(values.sum() + bias[first] - bias[other])
    assert total == pytest.approx(float(logits[first] - logits[other]), abs=1e-4)
    named = [mark["text"] for mark in chart["layout"]["annotations"]]
    order = values.argsort(descending=True).tolist()
    assert named == [f"map {n}" for n in (*order[:3], order[-1])] and explored.channel == order[0]

    explored.layer = "conv3_x"
    explored.refresh()
    chart = page._send.call_args.args[0]
    assert chart["win"] == chart["opts"]["title"] == "Mean activations"


@pytest.mark.parametrize("method", inside.RELU_BACKWARD)
def test_every_pattern_in_the_explorer_is_followed_by_its_control(explored, method):
    explored, page = explored[0], explored[0].page
    explored.method, explored.layer = method, "conv4_x"
    explored.refresh()
    page.text.reset_mock()
    explored.on_click(dict(event_type="Click", image_coord=dict(x=40, y=explored.above + 60)))
    pattern, controlled = told(page, "Map and pattern")  # the pattern at once, the control after all else
    assert page.text.call_args.kwargs["win"] == "Map and pattern" and "is being made" in pattern
    arguments = explored.layer, explored.channel, method
    expected = inside.reconstruct(explored.network.model, explored.x, *arguments)
    control, correlation = inside.control(explored.network.model, explored.x, expected, *arguments)
    assert inside.describe_control("conv4_x", correlation) in controlled
    pngs = [base64.b64decode(found) for found in re.findall("base64,(.*?)'", controlled)]
    for png, wanted in ((pngs[0], expected), (pngs[2], control)):
        shown = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png))).copy()).permute(2, 0, 1)
        assert (shown - (127.5 + 127.5 * wanted / wanted.abs().max())).abs().max() <= 1.5
        assert f"; full contrast ±{wanted.abs().max():.2g}<" in controlled
