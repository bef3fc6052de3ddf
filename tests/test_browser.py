"""The live page in a real browser, headless Chromium: what the user sees."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_visdom import make, panes, wait_for

import test_activations
from common import data, inside, responses
from common.network import load_network
from common.page import client

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
FLAGS += "--disable-background-networking --disable-component-update"
ROOT = Path(__file__).parent.parent
CAPTION = "div[style*='inline-block']"  # an image with its caption
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", "figures/screenshots"))
PANES = """() => Object.fromEntries([...document.querySelectorAll('.window')].map(pane => [
    [...pane.querySelectorAll('.pull-right')].map(title => title.innerText).join('')
        .replace(/[^A-Za-z ]/g, '').trim(),
    [...pane.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.calcdata.map(  // what is drawn
        (points, i) => plot.data[i].type == 'heatmap' ? points[0].z.length : points.length)),
]))"""


@pytest.fixture(scope="module")
def browser(page_files):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A window of 1280×800 in which no error may happen."""
    page, errors = browser.new_page(viewport=dict(width=1280, height=800)), []
    page.context.set_default_timeout(180_000)  # ms: each wait ends when what it waits for is there
    page.on("pageerror", lambda error: errors.append(str(error)))

    def note(message):
        usual = "favicon", "ERR_CONNECTION_REFUSED"  # visdom 0.3 has none; a test ends the server of its page
        if message.type == "error" and not any(text in message.text for text in usual):
            errors.append(message.text)

    page.on("console", note)
    yield page
    page.close()
    assert not errors


@pytest.fixture
def start(tmp_path, free_port):
    """Starts a script there, and gives the address that it prints; ends it with Ctrl-C."""
    processes = []

    def run(*flags):
        command = [sys.executable, "-u", *map(str, flags), "--port", str(free_port)]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        for line in process.stdout:
            if "http://127.0.0.1" in line:
                wait_for(lambda: client.is_listening(free_port))
                return next(word for word in line.split() if word.startswith("http"))
        pytest.fail("no address was printed")

    run.processes = processes
    yield run
    for process in processes:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=600)
        process.stdout.close()


def screenshot(page, name):
    path = ROOT / SCREENSHOTS
    path.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path / f"{name}.png")


def test_training_page_has_every_pane_and_grows(page, start):
    flags = (
        "--dataset digits --limit 512 --batch-size 32 --size 32 --epochs 400 --device cpu --precision fp32"
    )
    page.goto(start(ROOT / "train.py", *flags.split()))
    curves = {"Train Loss", "Validation Accuracy", "Learning Rate and Speed"}
    wanted = curves | {"Run", "Filters of conv", "Confusion", "Most confident mistakes click one to see why"}
    page.wait_for_function(f"() => document.querySelectorAll('.window').length >= {len(wanted)}")
    first = page.evaluate(PANES)
    assert wanted == first.keys()
    assert all(count > 0 for title in curves for count in first[title] if title != "Validation Accuracy")
    growing = "Train Loss", "Validation Accuracy"
    for _ in range(600):  # it grows while it is watched, as fast as the machine allows
        page.wait_for_timeout(1_000)
        later = page.evaluate(PANES)
        if all(later[curve][0] > first[curve][0] for curve in growing):
            break
    assert later["Confusion"] == [10] and page.locator(".window img").count() > 0  # a row a class; mistakes
    assert later["Train Loss"][0] > first["Train Loss"][0] > 0
    assert later["Validation Accuracy"][0] > first["Validation Accuracy"][0]
    for name in wanted:  # on the screen, without scrolling or dragging
        title = re.compile(f"^{name.replace('mistakes', 'mistakes:')}1?$")
        box = page.locator(".window", has=page.get_by_text(title)).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] + box["height"] <= 800, name
    pane = page.locator(".window", has=page.get_by_text("best validation accuracy"))  # two columns fit in it
    bottom = max(row["y"] + row["height"] for row in (row.bounding_box() for row in pane.locator("tr").all()))
    assert bottom <= (box := pane.bounding_box())["y"] + box["height"]
    screenshot(page, "training")


def test_click_on_a_map_draws_its_reconstruction(page, start, run):
    weights = run / "weights.pt"
    page.goto(start(ROOT / "Myvisdom.py", "--explore", "--dataset", "digits", "--weights", weights))
    page.wait_for_function("() => document.querySelectorAll('.window').length >= 5")
    image = page.locator(".window", has=page.get_by_text("double-click one")).locator("img").first
    network = load_network(weights, "digits", torch.device("cpu"))
    test_images = data.load("digits", "").test_images
    x = network.preprocess(test_images[0])
    (maps,) = inside.feature_maps(network.model, x, "conv5_x")
    number = inside.choose_maps(maps, "strongest:2")[1]
    row, column = divmod(number, 23)  # 23 columns of 23 px
    image.dblclick(position=dict(x=23 * column + 10, y=23 * row + 10))
    page.get_by_text(f"what map {number} of conv5_x responded to").wait_for()
    by_class = page.locator(".window", has=page.get_by_text("By class", exact=True))
    by_class.wait_for()  # in the background, from all 360 test images
    nine = page.locator(".window", has=page.get_by_text(f"What map {number} responds to most"))
    found = responses.strongest(network, test_images, batch=8)["conv5_x"]
    labels = data.load("digits", "").test_labels
    expected = [f"{labels[index]}, {value:.2f}" for index, value in zip(found[1][number], found[0][number])]
    assert [line for line in nine.inner_text().splitlines() if ", " in line] == expected
    assert nine.locator("img").count() == 9
    shown = page.evaluate(
        """() => { const pane = [...document.querySelectorAll('.window')].find(
            pane => pane.innerText.includes('Map and pattern'));
            const image = pane.querySelector('img'), canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
            return [...context.getImageData(0, 0, canvas.width, canvas.height).data]; }"""
    )
    expected = inside.reconstruct(network.model, x, "conv5_x", number)
    expected = 127.5 + 127.5 * expected / expected.abs().max()
    shown = torch.tensor(shown).view(network.size, network.size, 4)[..., :3].permute(2, 0, 1)
    assert (shown - expected).abs().max() <= 2
    screenshot(page, "explore")

    layer, method, test_image = page.locator(".window select").all()
    layer.select_option("conv3_x")
    page.get_by_text("The 128 maps of conv3_x").wait_for()
    method.select_option("gradient")
    page.get_by_text("conv3_x responded to, by the gradient").wait_for()
    test_image.select_option(label=test_image.locator("option", has_text="test image 7:").inner_text())
    page.locator(CAPTION, has_text="test image 7:").wait_for()
    for number, x, y in ((11, 11.9, 0.1), (12, 0.1, 1.1), (127, 7.5, 10.5)):  # 12 columns of 44 px
        image.dblclick(position=dict(x=44 * x, y=44 * y))
        page.get_by_text(f"what map {number} of conv3_x responded to").wait_for()
        (maps,) = inside.feature_maps(network.model, network.preprocess(test_images[7]), "conv3_x")
        page.get_by_text(f"mean activation {maps[0, number].mean():.3f}").wait_for()
        page.wait_for_function(
            """number => [...document.querySelectorAll('.js-plotly-plot')].some(plot =>
                plot.data?.[0].type == 'bar' && plot.data[0].marker?.color.indexOf('#e4572e') == number)""",
            arg=number,
        )
    page.get_by_text("a random image").click()
    page.locator(CAPTION, has_text="test image 7:").wait_for(state="hidden")


def test_front_page_is_there_at_any_address_and_after_a_kill(page, start, free_port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = f"http://127.0.0.1:{free_port}"
    assert start(ROOT / "Myvisdom.py") == bare
    for address in bare, f"{bare}/env/none":
        page.goto(address)
        page.get_by_text("No run yet").wait_for()
        page.get_by_text(f"python test_recon_conv5.py --port {free_port}").wait_for()
    assert page.locator(".btn-success").bounding_box()["y"] < 50  # the toolbar covers no pane
    run, _ = make(free_port, "digits_2026-11-26_09-30-00", dataset="digits")
    with run:
        page.get_by_text("digits_2026-11-26_09-30-00").click()  # without a reload
        page.get_by_text("Train Loss").wait_for()
        start.processes[-1].kill()
        start.processes[-1].wait()
    for file in (tmp_path / "runs/visdom").glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    assert start(ROOT / "Myvisdom.py") == bare
    newest = next(line for line in start.processes[-1].stdout if "newest" in line).split()[-1]
    page.goto(newest)
    page.get_by_text("Train Loss").wait_for()
    page.evaluate("localStorage.setItem('envID', 'gone'); localStorage.setItem('envIDs', '[\"gone\"]')")
    page.goto(bare)
    page.get_by_text("digits_2026-11-26_09-30-00").wait_for()
    screenshot(page, "front")


def test_explorer_opens_at_once_without_data(page, start, free_port, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "own.png")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "folder" / "blue.png")
    (tmp_path / "folder" / "broken.png").write_text("no image", encoding="utf-8")
    explore = start(ROOT / "Myvisdom.py", "--explore", "--image", "own.png", "--image", "folder")
    page.goto(explore)
    page.get_by_text("with it, this pane would show test images").wait_for()
    page.locator(CAPTION, has_text="own.png").wait_for()
    image = page.locator(".window select").nth(2)
    names = ["own.png", "blue.png", "broken.png", "a cat", "a horse", "a rocket"]
    assert image.locator("option").all_inner_texts() == names
    image.select_option("a cat")
    page.get_by_text("the network says cat").wait_for()
    image.select_option("broken.png")
    page.get_by_text("broken.png cannot be read as an image").wait_for()
    image.select_option("blue.png")
    page.locator(CAPTION, has_text="blue.png").wait_for()
    page.goto(explore.rpartition("/env/")[0])
    page.get_by_role("link", name="explore").click()
    page.locator(CAPTION, has_text="blue.png").wait_for()
    assert not (tmp_path / "data").exists()
    start.processes[-1].send_signal(signal.SIGINT)
    page.get_by_text("opens it again").wait_for()  # without a reload
    start.processes[-1].wait(timeout=600)
    start(ROOT / "Myvisdom.py")
    page.goto(explore)
    page.get_by_text("No run yet").wait_for()  # the front page
    assert not page.get_by_role("link", name="explore").count()


def test_names_of_files_and_runs_are_only_text(page, start, run, tmp_path, free_port):
    name = "<img src=x onerror='window.hacked=1'>&$x_{.png"
    Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    flags = "--dataset digits --limit 512 --size 32 --epochs 400 --device cpu --out".split()
    address = start(ROOT / "train.py", *flags, tmp_path / "<b>a&b #1")
    flags = ["--weights", str(run / "weights.pt"), "--image", str(tmp_path / name), "--port", str(free_port)]
    test_activations.main([*flags, "--out", str(tmp_path)])
    page.goto(address)
    page.get_by_text("learning rate").first.wait_for()
    page.goto(f"{address.rpartition('/')[0]}/figures")
    page.get_by_text("How strongly each of the 64 maps").first.wait_for()
    page.wait_for_timeout(1000)
    assert page.evaluate("window.hacked") is None


def test_click_on_a_mistake_leads_to_its_reason(page, start, run, free_port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, digits = run / "weights.pt", data.load("digits", "")
    network = load_network(weights, "digits", torch.device("cpu"))
    bare = start(ROOT / "Myvisdom.py")
    training, history = make(free_port, dataset="digits", weights=str(weights), data="data")
    with torch.no_grad():
        logits = network.model(network.preprocess(digits.test_images))
    history["epochs"].append(dict(epoch=1, train_accuracy=0.5, test_accuracy=0.25, last_size_accuracy=None))
    training.classes, training.evaluation = digits.classes, (digits.test_images, digits.test_labels, logits)
    with training:
        wait_for(
            lambda: "Mistakes" in (panes(free_port, "mine") or {})
        )  # a page that is not there leads to the front
        page.goto(f"{bare}/env/mine")
        page.get_by_text("click one to see why").wait_for()
    number, truth, said, _ = inside.mistakes(digits.test_labels, logits, digits.classes)[2]
    mistake = page.locator("a", has_text=f"image {number}:")
    with page.expect_popup() as popup:
        mistake.click()
    reason = popup.value
    flags = f"--weights {weights} --dataset digits --image {number} --port {free_port}"
    reason.get_by_text(f"python Myvisdom.py --explore {flags}").wait_for()

    start(ROOT / "Myvisdom.py", "--explore", "--dataset", "digits", "--weights", weights)
    mistake.click()  # the same window shows it
    reason.locator(CAPTION, has_text=f"test image {number}: {truth};").wait_for()
    reason.get_by_text(f"Why {said} and not {truth}: what each map adds").wait_for()
    reason.get_by_text("Control, with random weights in conv4_x and conv5_x: rank corr").wait_for()
    options = reason.locator(".window select").nth(2).locator("option")
    wanted = f"test image {number}: {truth}, taken for {said}"
    reason.wait_for_function(
        """wanted => [...document.querySelectorAll('option')].some(option => option.innerText == wanted)""",
        arg=wanted,
    )
    assert options.all_inner_texts().index(wanted) < 6  # the third of them, after a test image of the start
    screenshot(reason, "mistake")
