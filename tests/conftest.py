"""Small data and a small trained run, made once."""

import os
import signal
import socket

os.environ["OMP_NUM_THREADS"] = "1"  # of a process: pytest runs two, and threads that wait for a core spin

import numpy as np
import pytest
from PIL import Image
from torch import nn

import train
from common import data
from common.cli import UserError
from common.page import assets, client
from common.run import Run

# What a shell started in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """CIFAR-10 as folders of images: 6 to train on and 3 to test, for each class."""
    root = tmp_path_factory.mktemp("cifar10")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(data.CIFAR10_CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                image[:, :, label % 3] += np.uint8(5 * label)
                Image.fromarray(image).save(folder / f"{i:04}.png")
    return root


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing them after each epoch takes longer than these epochs; those of `run` are drawn."""
    monkeypatch.setattr(Run, "_draw_curves", lambda run: None)


@pytest.fixture(autouse=True)
def no_page_of_somebody(monkeypatch):
    """What is open on the default port is not ours: no figure goes there."""
    is_listening = client.is_listening
    monkeypatch.setattr(client, "is_listening", lambda port: port != 8097 and is_listening(port))


@pytest.fixture
def small_network(monkeypatch):
    """Runs train a network that takes no time: for what does not depend on the network."""

    def network(classes):
        convolution = nn.Conv2d(3, 4, 3, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    monkeypatch.setattr("common.run.ResNet18", network)


@pytest.fixture(scope="session")
def page_files():
    """For what `python Myvisdom.py` serves: the files of visdom's page, which a machine without web and npm
    cannot have."""
    try:
        assets.ensure()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A short run on the digits: its folder and what it printed is not kept."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    flags = "--dataset digits --limit 256 --batch-size 128 --epochs 2 --size 32 --no-visdom --device cpu "
    flags += "--precision fp32"
    assert not train.main([*flags.split(), "--out", str(out)])
    return out
