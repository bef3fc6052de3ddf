"""The live page, with the real visdom server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import visdom

import Myvisdom
import train
from common.cli import UserError

ROW = dict(epoch=1, train_accuracy=0.5, test_accuracy=0.25)


@pytest.fixture
def port(monkeypatch):
    """A free port; no server that a page starts outlives the test, whatever happens in it."""
    servers, start = [], Myvisdom.start_server
    monkeypatch.setattr(Myvisdom, "start_server", lambda port: servers.append(start(port)) or servers[-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield port
    for server in servers:
        server.kill()
        server.wait()


def wait_for(condition, seconds=40):
    """What `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if result := condition():
                return result
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    pytest.fail(f"not within {seconds} s")


def panes(port, env):
    client = visdom.Visdom(
        "http://127.0.0.1", port=port, env=env, use_incoming_socket=False, raise_exceptions=True
    )
    return json.loads(client.get_window_data(env=env))


def points(pane):
    return list(zip(pane["content"]["data"][0]["x"], pane["content"]["data"][0]["y"]))


def test_page_draws_what_the_run_appends_and_ends_with_it(port, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    history = dict(loss=[2.0, 1.0], rate=[0.1, 0.2], epochs=[])
    page = Myvisdom.Page(history, "mine", {"recipe": "<b>fast"}, port)
    assert f"http://127.0.0.1:{port}/env/mine" in capsys.readouterr().out
    drawn = wait_for(lambda: (now := panes(port, "mine")) and "Run" in now and now)
    assert points(drawn["Train Loss"]) == [(1, 2), (2, 1)]
    assert points(drawn["Learning Rate"]) == [(1, 0.1), (2, 0.2)]
    assert "&lt;b&gt;fast" in drawn["Run"]["content"]

    history["rate"].append(0.3), history["loss"].append(0.5), history["epochs"].append(ROW)
    drawn = wait_for(lambda: (now := panes(port, "mine")) and "Train Accuracy" in now and now)
    assert points(drawn["Train Loss"]) == [(1, 2), (2, 1), (3, 0.5)]
    assert points(drawn["Validation Accuracy"]) == [(1, 25)]
    assert points(drawn["Train Accuracy"]) == [(1, 50)]

    addresses = subprocess.run(["cat", f"/proc/{page.server.pid}/net/tcp"], capture_output=True, text=True)
    listening = [line.split()[1] for line in addresses.stdout.splitlines() if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening or sys.platform != "linux"

    page.close("finished")
    assert page.server.poll() is not None and not Myvisdom.listening(port)

    again = subprocess.Popen(
        [sys.executable, Path(Myvisdom.__file__), "--port", str(port)], start_new_session=True
    )
    try:
        drawn = wait_for(lambda: panes(port, "mine"))
        assert len(points(drawn["Train Loss"])) == 3 and "finished" in drawn["Run"]["content"]
        assert Myvisdom.main(["--port", str(port)]) is None  # says that it is there already
        page = Myvisdom.Page(history, "other", {}, port)
        assert page.server is None  # this one is not the page's to end
        page.close("finished")
        assert Myvisdom.listening(port)
    finally:
        os.killpg(again.pid, signal.SIGKILL)
        again.wait()


def test_server_that_dies_does_not_end_the_run_and_comes_back_whole(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = dict(loss=[2.0], rate=[0.1], epochs=[ROW])
    page = Myvisdom.Page(history, "mine", {}, port)
    try:
        wait_for(lambda: panes(port, "mine"))
        page.server.kill()
        page.server.wait()
        history["rate"].append(0.3), history["loss"].append(0.5)
        time.sleep(3)  # a draw fails
        page.server = Myvisdom.start_server(port)
        drawn = wait_for(lambda: (now := panes(port, "mine")) and "Train Loss" in now and now)
        assert points(drawn["Train Loss"]) == [(1, 2), (2, 0.5)]
    finally:
        page.close("finished")
    assert not page._thread.is_alive()


def test_port_of_another_program_is_refused(port, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()  # and never answers
        with pytest.raises(UserError, match=f"port {port} is used by another program.*--no-visdom"):
            Myvisdom.listening(port)


def test_training_draws_its_page(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --limit 128 --epochs 1 --size 32 --device cpu --precision fp32"
    assert not train.main([*flags.split(), "--port", str(port)])
    saved = json.loads((tmp_path / "runs/visdom/digits.json").read_text())["jsons"]
    assert len(points(saved["Train Loss"])) == len(points(saved["Validation Accuracy"])) == 1
    assert "finished" in saved["Run"]["content"] and "fast" in saved["Run"]["content"]
    assert not Myvisdom.listening(port)
