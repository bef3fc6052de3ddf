"""The report: what it says of a network, also of one that lacks something, and how it looks in a browser."""

import csv
import functools
import html
import io
import re
import shutil

import pytest
import torch
from PIL import Image

from common import data, figures, inside
from common.network import load_network
from extras import maximize, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the report with those flags, without drawing what takes long, and returns its HTML."""
    monkeypatch.chdir(tmp_path)
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "PNG")
    monkeypatch.setattr(figures, "png", lambda figure: pixel.getvalue())
    monkeypatch.setattr(figures, "grid", lambda *args, **options: figures.Figure())
    monkeypatch.setattr(report.decision, "draw", lambda *args: (figures.Figure(), ["3: logit 1 = …"]))
    compared = figures.Figure(), [], dict.fromkeys(inside.RELU_BACKWARD, 0.5)
    monkeypatch.setattr(report.sanity_check, "compare", lambda *args: compared)

    def write(weights, *flags):
        report.main(["--dataset", "digits", "--weights", str(weights), "--device", "cpu", *flags])
        return (tmp_path / "figures/report.html").read_text(encoding="utf-8")

    return write


def words(page):
    """What a reader sees of the page, in one line."""
    return " ".join(html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", "", page, flags=re.S)).split())


def numbers_of_figures(page):
    return re.findall(r"<h3>Figure ([\d.]+):", page)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def changed(run, tmp_path):
    """Weights as those of `run`, alone in a folder, changed by a function that gets what is in the file."""

    def change(function=lambda saved: None):
        path = tmp_path / "other/weights.pt"
        path.parent.mkdir()
        saved = torch.load(run / "weights.pt", weights_only=True)
        function(saved)
        torch.save(saved, path)
        return path

    return change


def test_it_tells_this_networks_own_numbers(run, write):
    page = write(run / "weights.pt", "--image", "3")
    text, network = words(page), load_network(run / "weights.pt", "digits", torch.device("cpu"))
    x = network.preprocess(data.load("digits", "").test_images[3])
    for layer, maps in zip(("conv1", "conv5_x"), inside.feature_maps(network.model, x, "conv1", "conv5_x")):
        means = maps[0].mean((1, 2))
        best, silent = int(means.argmax()), int((maps[0] == 0).flatten(1).all(1).sum())
        assert f"It is map {best}, with {means[best]:.3f}, {means[best] / means.mean():.1f} times" in text
        assert f"{silent} of {len(means)} maps, {silent / len(means):.0%}, are silent" in text
        pattern = inside.reconstruct(network.model, x, layer, best)
        _, correlation = inside.control(network.model, x, pattern, layer, best)
        limit = "above 0.6" if correlation > 0.6 else "between" if correlation > 0.3 else "at most 0.3"
        assert f"correlation of pattern and control, {correlation:.2f}, is {limit}" in text
    header, *_, last = rows_of(run / "metrics.csv")
    last = dict(zip(header, last))
    assert f"{float(last['train_accuracy']):.2%} on the training images" in text
    assert f"{float(last['test_accuracy']):.2%} on the test images" in text
    assert "4 iterations in 2 epochs. The machine: " in text and "not recorded" not in text
    counts = [list(map(int, row[1:])) for row in rows_of(run / "confusion.csv")[1:]]
    right = sum(row[i] for i, row in enumerate(counts))
    worst = max(row[j] for i, row in enumerate(counts) for j in range(10) if i != j)
    assert f"{right} of 360 are right" in text and f"The most frequent mistake: {worst} image" in text
    assert "for one image of 32×32 px" in text and "1×1×512" in text and "With a single position" in text
    drawn = "6.1 6.2 7.1 7.2 7.3 7 8.1 8.2 8.3 8.4.1 8.4.2 8.5.1 8.5.2 9.1 9.2 9.3 9.4"
    assert numbers_of_figures(page) == drawn.split()
    flags = f"--weights {run / 'weights.pt'} --dataset digits --device cpu --image 3"
    assert f"python test_recon_conv5.py {flags}" in text


def test_filters_that_respond_to_brightness_are_counted(changed, write):
    def paint(saved):
        weight = saved["model"]["conv1.conv.weight"]
        weight[:10] = weight[:10, :1]  # grey edges
        weight[10:] -= weight[10:].mean(1, keepdim=True)  # only differences between the channels

    assert "In 10 of the 64 filters, most of the energy" in words(write(changed(paint)))


def test_what_weights_lack_is_said(changed, write):
    def strip(saved):
        for key in ("settings", "accuracy"):
            del saved[key]

    page = write(changed(strip))
    text = words(page)
    assert (
        "No training settings are recorded with these weights" in text
        and "These weights have no history" in text
    )
    assert "no confusion matrix (figure 9.1)" in text and "python train.py --evaluate --weights" in text
    assert "Its accuracy is not recorded" in text and "Table 2" not in text
    assert not {"6.1", "6.2", "9.1"} & set(numbers_of_figures(page))


@pytest.mark.parametrize("name, column", [("metrics.csv", "test_accuracy"), ("confusion.csv", "1")])
def test_tables_of_another_run_are_not_shown(run, changed, name, column):
    folder = changed().parent
    for table in ("metrics.csv", "loss.csv", "confusion.csv"):
        shutil.copy(run / table, folder / table)
    header, *rows = rows_of(folder / name)
    rows[-1][header.index(column)] = "0.987" if name == "metrics.csv" else "987"
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    history = report.History(folder / "weights.pt")
    of_metrics, of_confusion = name == "metrics.csv", name == "confusion.csv"
    assert not (history.epochs or history.losses) == of_metrics and (len(history.counts) == 0) == of_confusion


@pytest.mark.parametrize(
    "content",
    ["", "epoch\n1\n", "a,b\n1\n", "class,a\nx\n", "\xff\xfe", "\0" * 2**18, f"epoch\n{'9' * 400}\n"],
)
def test_tables_that_are_damaged_are_none(changed, content):
    path = changed()
    for table in ("metrics.csv", "loss.csv", "confusion.csv"):
        (path.parent / table).write_text(content, encoding="latin-1")
    history = report.History(path)
    assert not history.epochs and not history.losses and not len(history.counts)


def test_a_silent_layer_has_no_pattern(changed, write):
    def silence(saved):
        saved["model"]["conv5_x.block2.bn2.bias"] = torch.full((512,), -1e4)

    page = write(changed(silence))
    text = words(page)
    assert "All 512 maps are silent" in text and "There is no figure 8.5.2: all 512 maps" in text
    assert "There is no figure 9.2" in text and "no evidence for" in text
    assert "8.5.1" in numbers_of_figures(page) and not {"8.5.2", "9.2"} & set(numbers_of_figures(page))


def test_names_are_text(changed, write, tmp_path):
    image = tmp_path / "<i>one & 'two'.png"
    Image.new("RGB", (32, 32), "red").save(image)

    def rename(saved):
        saved["classes"] = [f"<script>{number}</script>" for number in range(10)]
        saved["source"] = "<b>data</b>"

    page = write(changed(rename), "--image", str(image))
    assert not re.search("<script|<i>|<b>", page)
    assert "<script>3</script>" in words(page) and "This is <i>one & 'two'.png, 32×32 px" in words(page)


def test_full_has_what_the_strongest_maps_look_for(changed, write, monkeypatch):
    monkeypatch.setattr(maximize, "maximize", functools.partial(maximize.maximize, steps=1))
    monkeypatch.setattr(report.top_pictures, "draw", lambda *args: figures.Figure())
    page = write(changed(), "--full")
    assert numbers_of_figures(page)[-4:] == ["9.5.1", "9.6.1", "9.5.2", "9.6.2"]
    assert "9.1" in numbers_of_figures(page)  # computed, since there is no confusion.csv
    assert "are of 5 random networks" in words(page)


def test_a_second_run_is_put_beside_it(run, changed, write, tmp_path):
    def slower(saved):
        saved["settings"]["lr"] = 0.0123

    folder = changed(slower).parent
    for table in ("metrics.csv", "loss.csv", "confusion.csv"):
        shutil.copy(run / table, folder / table)
    page = write(run / "weights.pt", "--compare", str(folder))
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("Table 4")[1].split("</table>")[0], re.S)
    assert len(rows) == 2 and "0.0123" in words(rows[1]) and "Table 5: accuracy by class" in page
    assert numbers_of_figures(page)[-1] == "10.1"

    (folder / "weights.pt").unlink()
    (folder / "confusion.csv").unlink()
    history = report.History(report.weights_of_run(folder))  # of tables alone
    assert history.epochs and history.accuracy and not history.described() and not len(history.counts)


def test_a_second_run_that_is_none(run, write, tmp_path, capsys):
    (tmp_path / "several").mkdir()
    for name in "ab":
        shutil.copy(run / "weights.pt", tmp_path / f"several/{name}.pt")
    (tmp_path / "nothing").mkdir()
    for name, said in (
        ("several", "2 files of weights"),
        ("nothing", "no run in"),
        ("missing", "no weights in"),
    ):
        with pytest.raises(SystemExit) as stop:
            write(run / "weights.pt", "--compare", name)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_curves_of_two_runs_are_in_one_figure():
    rows = [dict(epoch=n + 1, test_accuracy=n / 10) for n in range(4)]
    left, right = figures.compared_curves([("a", [2.0] * 20, rows), ("b", [], rows[:2])]).axes
    assert [line.get_xdata().tolist() for line in left.lines] == [list(range(2, 21))]
    assert [list(line.get_ydata()) for line in right.lines] == [[0, 10, 20, 30], [0, 10]]


def test_it_reads_well_in_a_browser_and_on_paper(run, tmp_path, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    monkeypatch.chdir(tmp_path)
    report.main(["--dataset", "digits", "--weights", str(run / "weights.pt"), "--device", "cpu"])
    path, problems = tmp_path / "figures/report.html", []
    assert path.stat().st_size < 6e6
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(java_script_enabled=True)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url))
        page.goto(path.as_uri())
        problems = [text for text in problems if not text.startswith(("data:", path.as_uri()))]
        assert not problems
        sources = page.evaluate("[...document.images].map(i => [i.naturalWidth > 300, i.alt.length > 5])")
        assert len(sources) == 17 and all(all(source) for source in sources)
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
        for width in (360, 1280):
            page.set_viewport_size(dict(width=width, height=800))
            assert page.evaluate("document.documentElement.scrollWidth") == width
        targets = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
        assert targets == page.evaluate("[...document.querySelectorAll('section h2')].map(h => h.id)")
        page.emulate_media(media="print")
        breaks = page.evaluate(
            "[...document.querySelectorAll('section h2')].map(h => getComputedStyle(h).breakBefore)"
        )
        assert len(breaks) == 11 and set(breaks) == {"page"}
        page.emulate_media(media="screen", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 26, 32)"
        pdf = page.pdf()
        browser.close()
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 11  # sections begin on pages of their own
