"""The figure scripts, run as a user runs them, on a small trained network."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import test_activations
import test_featuremaps
import test_filter
import test_recon_conv1
import test_recon_conv5
import train
from common import data, figures
from common.network import REFERENCE, load_network
from MyResnet import to_torchvision

FIGURES = {
    test_filter: [
        "filters_channel_0.png",
        "filters_channel_1.png",
        "filters_channel_2.png",
        "filters_rgb.png",
    ],
    test_featuremaps: ["image.png", "featuremaps_conv1.png", "featuremaps_conv5_x.png"],
    test_activations: ["activations_conv1.png", "activations_conv5_x.png"],
    test_recon_conv1: ["recon_conv1_map*_guided.png"],
    test_recon_conv5: ["recon_conv5_x_map*_guided.png"],
}


@pytest.mark.parametrize("script", FIGURES, ids=lambda script: script.__name__)
def test_script_writes_its_figures_and_names_them(script, run, tmp_path, capsys):
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--out", str(tmp_path / "new")]
    assert not script.main(flags)
    printed = capsys.readouterr().out.splitlines()
    for pattern in FIGURES[script]:
        (path,) = (tmp_path / "new").glob(pattern)
        assert str(path) in printed
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 10
    assert len(list((tmp_path / "new").iterdir())) == len(FIGURES[script])


def test_column_charts_name_the_strongest_map(run, tmp_path, capsys):
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--image", "7"]
    test_activations.main([*flags, "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    network = load_network(run / "weights.pt", "digits", torch.device("cpu"))
    x = network.preprocess(data.load("digits", "").test_images[7])
    with torch.no_grad():
        for layer, module in (("conv1", network.model.conv1), ("conv5_x", network.model)):
            stages = [network.model.conv1] if layer == "conv1" else list(module.children())[:5]
            means = torch.nn.Sequential(*stages)(x)[0].mean((1, 2))
            best = int(means.argmax())
            assert f"{layer}: the strongest is map {best}, mean activation {means[best]:.4f}" in printed


def test_map_and_method_can_be_chosen(run, tmp_path):
    flags = ["--dataset", "digits", "--weights", str(run / "weights.pt"), "--out", str(tmp_path)]
    test_recon_conv5.main([*flags, "--map", "231", "--method", "deconvnet"])
    test_recon_conv1.main([*flags, "--map", "43", "--method", "gradient"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "recon_conv5_x_map231_deconvnet.png",
        "recon_conv1_map43_gradient.png",
    }


def test_an_image_file_of_the_users(run, tmp_path, capsys):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "mine.jpg")
    flags = ["--weights", str(run / "weights.pt"), "--out", str(tmp_path)]
    test_featuremaps.main([*flags, "--image", str(tmp_path / "mine.jpg")])
    assert "\nmine.jpg; the network says " in capsys.readouterr().out
    pixels = np.asarray(Image.open(tmp_path / "image.png").convert("RGB"))
    assert (np.abs(pixels.astype(int) - (254, 0, 0)).max(2) < 3).mean() > 0.4


def test_without_data_a_photograph_is_used(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    test_recon_conv1.main(["--weights", str(run / "weights.pt")])
    printed = capsys.readouterr().out
    assert "no CIFAR-10 in data" in printed and "photograph of a cat" in printed
    assert len(list((tmp_path / "figures").iterdir())) == 1


def test_without_a_run_the_reference_network_is_used(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test_filter.main([])
    assert "weights/resnet18_cifar10.pt, trained on CIFAR-10, jpg files" in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "runs/cifar10")
    test_filter.main([])
    assert "network: runs/cifar10/weights.pt, trained on scikit-learn's" in capsys.readouterr().out


def test_reference_network_is_whole_small_and_of_the_default_recipe():
    assert REFERENCE.stat().st_size < 24e6
    saved = torch.load(REFERENCE, weights_only=True)
    assert {"model", "mean", "std", "settings", "accuracy", "source", "classes", "size"} <= saved.keys()
    assert saved["size"] == 224 and saved["accuracy"] > 0.88 and saved["classes"] == data.CIFAR10_CLASSES
    recipe = train.RECIPES["standard"]
    sizes = train.sizes_by_epoch(recipe["sizes"], recipe["epochs"])
    assert saved["settings"].items() >= (recipe | dict(sizes=sizes)).items()
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(to_torchvision(saved["model"]))


def test_zero_is_drawn_at_neutral_grey_on_a_symmetric_scale():
    pattern = torch.zeros(3, 4, 4)
    pattern[0, 0, 0], pattern[1, 3, 3] = 2.0, -1.0
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    maps, control = torch.ones(1, 4, 2, 2), (pattern, 0.5)
    figure = figures.reconstruction(image, "", maps, pattern, "conv1", 3, "guided", control)
    assert (figure.axes[1].images[0].get_array() == 1).all()
    drawn = figure.axes[2].images[0].get_array()
    assert drawn[1, 1].tolist() == [0.5, 0.5, 0.5]
    assert drawn[0, 0].tolist() == [1.0, 0.5, 0.5] and drawn[3, 3].tolist() == [0.5, 0.25, 0.5]


def test_grid_puts_each_map_where_its_number_says():
    cells = torch.arange(6.0).view(6, 1, 1).expand(6, 3, 2)
    axes = figures.grid(cells, 4, "", 5.0, "").axes[0]
    drawn = axes.images[0].get_array()
    columns = dict(zip((label.get_text() for label in axes.get_xticklabels()), axes.get_xticks()))
    rows = dict(zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks()))
    for number in range(6):
        y, x = rows[str(number // 4 * 4)], columns[f"+{number % 4}"]
        assert drawn[int(y), int(x)] == number
    assert axes.images[0].get_clim() == (0, 5)


def test_column_chart_has_the_values_as_heights():
    axes = figures.Figure().subplots()
    figures.draw_columns(axes, torch.tensor([1.0, 3.0, 2.0]), [1], "", "")
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches[:3]}
    assert heights == {0: 1, 1: 3, 2: 2}
    assert axes.patches[3].get_height() == 3 and axes.texts[0].get_text() == "map 1: 3.000"


def test_each_channel_draws_its_own_filters(run, tmp_path, monkeypatch):
    drawn, real = [], figures.grid
    monkeypatch.setattr(
        figures, "grid", lambda cells, **options: drawn.append(cells) or real(cells, **options)
    )
    test_filter.main(["--weights", str(run / "weights.pt"), "--out", str(tmp_path)])
    weights = torch.load(run / "weights.pt", weights_only=True)["model"]["conv1.conv.weight"]
    for channel in range(3):
        assert torch.equal(drawn[channel], weights[:, channel].float())
    assert drawn[3].amin() >= 0 and drawn[3].amax() <= 1


def test_curves_draw_what_was_measured():
    rows = [
        dict(epoch=1, size=32, train_accuracy=0.1, test_accuracy=0.2, last_size_accuracy=None),
        dict(epoch=2, size=32, train_accuracy=0.3, test_accuracy=0.4, last_size_accuracy=0.5),
    ]
    lines = figures.accuracy_curve(rows, 64, "").axes[0].lines
    drawn = {line.get_label(): line.get_ydata() for line in lines}
    assert drawn["validation"] == pytest.approx([20, 40]) and drawn["training"] == pytest.approx([10, 30])
    assert drawn["validation at 64 px"] == pytest.approx([50])
