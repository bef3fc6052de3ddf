"""What goes beyond the report, each against an independent reference."""

import copy
import csv
import re

import captum.attr
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

import train
from common import data, figures, inside, responses
from common.images import photograph
from common.network import REFERENCE, load_network
from extras import (
    ablation,
    attribution,
    decision,
    deletion,
    gradcam,
    maximize,
    reconstruct,
    sanity_check,
    top_pictures,
)


@pytest.fixture(scope="module")
def network(run):
    return load_network(run / "weights.pt", "digits", torch.device("cpu"))


@pytest.fixture
def flags(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--dataset", "digits", "--weights", str(run / "weights.pt")]


def drawn(tmp_path, name):
    pixels = np.asarray(Image.open(tmp_path / "figures" / name).convert("L"))
    assert min(pixels.shape) > 300 and pixels.std() > 10
    return pixels


def test_gradcam_draws_the_classes_that_are_named(flags, tmp_path, capsys):
    gradcam.main([*flags, "--image", "3", "--class", "4"])
    drawn(tmp_path, "gradcam.png")
    with pytest.raises(SystemExit):
        gradcam.main([*flags, "--class", "cat"])
    assert "no class 'cat': --class takes 0, 1, 2" in capsys.readouterr().err


def test_any_layer_and_maps_are_reconstructed(flags, tmp_path):
    reconstruct.main([*flags, "--layer", "conv3_x.block1.conv2", "--map", "strongest:2", "--unit", "max"])
    names = [path.name for path in (tmp_path / "figures").iterdir()]
    assert len(names) == 2 and all(name.endswith("_guided_max.png") for name in names)
    reconstruct.main([*flags, "--layer", "conv2_x", "--map", "1,2", "--method", "deconvnet"])
    drawn(tmp_path, "recon_conv2_x_map1_deconvnet.png")
    drawn(tmp_path, "recon_conv2_x_map2_deconvnet.png")


def test_top_pictures_are_the_strongest(network):
    images = data.load("digits", "").test_images[:57]
    found = responses.strongest(network, images, batch=10, precision="fp32")
    for stage in inside.STAGES:
        with torch.no_grad():
            (maps,) = inside.feature_maps(network.model, network.preprocess(images), stage)
        values, indices, positions, means = found[stage]
        peaks = maps.flatten(2).amax(2)
        torch.testing.assert_close(values, peaks.topk(9, dim=0).values.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(means, maps.mean((2, 3)).T, rtol=1e-4, atol=1e-5)
        at = maps.flatten(2)[indices, torch.arange(len(values))[:, None], positions]
        torch.testing.assert_close(values, at, rtol=1e-4, atol=1e-5)


def test_top_pictures_are_cached_for_the_same_network_and_images(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, real = [], responses.strongest
    monkeypatch.setattr(responses, "strongest", lambda *args: calls.append(1) or real(*args))
    images = data.load("digits", "").test_images[:12]
    first = responses.cached_strongest(network, images)
    again = responses.cached_strongest(network, images)
    assert len(calls) == 1 and torch.equal(first["conv4_x"][0], again["conv4_x"][0])
    responses.cached_strongest(network, images.flip(3))
    assert len(calls) == 2
    other = network._replace(model=inside.randomize(network.model, ["conv1"]))
    responses.cached_strongest(other, images.flip(3))
    assert len(calls) == 3
    for path in responses.CACHE.iterdir():
        path.write_bytes(b"rubbish")
    responses.cached_strongest(network, images)
    assert len(calls) == 4


def test_crop_is_the_receptive_field_within_the_image():
    assert responses.crop_box(0, 112, 7, 2, 224) == (0, 0, 4, 4)
    assert responses.crop_box(112 * 10 + 20, 112, 7, 2, 224) == (17, 37, 24, 44)
    assert responses.crop_box(48, 7, 435, 32, 224) == (0, 0, 224, 224)


def test_top_pictures_are_drawn_where_they_respond(flags, tmp_path, monkeypatch):
    drawn_places, real = [], top_pictures.nine_and_nine
    monkeypatch.setattr(top_pictures, "nine_and_nine", lambda *args: drawn_places.append(args) or real(*args))
    top_pictures.main([*flags, "--layer", "conv1", "--map", "1,5"])
    drawn(tmp_path, "top_pictures_conv1_map1.png")
    drawn(tmp_path, "top_pictures_conv1_map5.png")
    assert [args[2] for args in drawn_places] == [1, 5]
    for places, values, *_ in drawn_places:
        assert len(places) == 9 and values.tolist() == sorted(values.tolist(), reverse=True)
        for crop, pattern, name, scale in places:
            assert re.match(r"full contrast ±\S+\ncontrol: -?\d\.\d\d", scale)
            assert crop.shape == pattern.shape and max(crop.shape[1:]) <= 7 and name.isdigit()
            assert pattern.max() > 0.99 or pattern.min() < 0.01  # its strongest point is in the crop


def test_fewer_than_nine_leave_the_other_cells_empty():
    place = torch.zeros(3, 7, 7), torch.zeros(3, 7, 7), "cat", "full contrast"
    figure = top_pictures.nine_and_nine([place] * 2, torch.tensor([2.0, 1.0]), 0, "conv2_x", "guided")
    seen = [axes for part in figure.subfigs for axes in part.axes if axes.axison]
    assert len(seen) == 4 and all(axes.images for axes in seen)
    assert "random weights in conv1 and conv2_x" in " ".join(text.get_text() for text in figure.texts)


def test_close_up_frames_the_box():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pattern = torch.zeros(3, 64, 64)
    pattern[0, 10, 20] = pattern[1, 29, 49] = 1.0  # opposite corners of what is framed
    pattern[0, 5, 5] = 0.3  # less than a tenth of the energy
    figure = figures.close_up(image, "", pattern, "conv1", 0, "guided", (pattern, 0.7))
    frame = figure.axes[0].patches[0]
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (19.5, 9.5, 30, 20)
    pictures = [axis for axis in figure.axes if axis.images]
    assert len(pictures) == 4  # with the control
    for axis in pictures[1:]:
        assert axis.get_xlim() == (19.5, 49.5) and axis.get_ylim() == (29.5, 9.5)


def test_maximize_finds_more_than_any_test_image(network):
    images = data.load("digits", "").test_images
    best = responses.strongest(network, images)["conv3_x"][3].amax(1)
    number = int(best.argsort()[len(best) // 2])
    image, activation = maximize.maximize(network, "conv3_x", number, steps=60)
    assert activation > best[number] > 0
    assert image.shape == (3, 32, 32) and 0 <= image.min() and image.max() <= 1
    again, _ = maximize.maximize(network, "conv3_x", number, steps=60)
    assert torch.equal(image, again)
    other, _ = maximize.maximize(network, "conv3_x", number, steps=60, seed=1)
    assert not torch.allclose(image, other, atol=0.05)


def test_maximize_wakes_a_silent_map(network):
    bn = network.model.conv3_x.block2.bn2
    before = bn.bias[0].item()
    with torch.no_grad():
        start = maximize.to_image(maximize.random_spectrum(32, 0))
        (maps,) = inside.feature_maps(network.model, network.normalize(start), "conv3_x")
        bn.bias[0] -= maps[0, 0].max() + 0.05
        assert maximize.mean_activation(network, start, "conv3_x", 0) == 0
    try:
        assert maximize.maximize(network, "conv3_x", 0, steps=100)[1] > 0
    finally:
        with torch.no_grad():
            bn.bias[0] = before


def test_maximize_draws_and_compares(flags, tmp_path, capsys):
    maximize.main([*flags, "--layer", "conv2_x", "--map", "3", "--steps", "5"])
    drawn(tmp_path, "maximize_conv2_x_map3.png")
    assert "the best test image has" in capsys.readouterr().out


def test_stages_are_randomised_from_the_top(network):
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    other = inside.randomize(network.model, ["conv5_x", "conv4_x"]).state_dict()
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if name.endswith("conv1.weight"):
            assert torch.equal(other[name], tensor) != name.startswith(("conv5_x", "conv4_x"))


@pytest.mark.parametrize("layer, stages", [("conv5_x", "45"), ("conv3_x.block1.conv2", "23"), ("conv1", "1")])
@pytest.mark.parametrize("unit", ["map", "max"])
def test_a_control_is_the_pattern_of_random_upper_stages(network, layer, stages, unit):
    x = network.preprocess(data.load("digits", "").test_images[3])
    (maps,) = inside.feature_maps(network.model, x, layer)
    (channel,) = inside.choose_maps(maps, "strongest:1")
    pattern = inside.reconstruct(network.model, x, layer, channel, "guided", unit)
    names = [stage for stage in inside.STAGES if stage[4] in stages]
    position = int(maps[0, channel].argmax()) if unit == "max" else "map"
    expected = next(
        pattern
        for seed in range(10)
        if (pattern := inside.reconstruct(
            inside.randomize(network.model, names, seed), x, layer, channel, "guided", position
        )).any()
    )  # fmt: skip
    torch.manual_seed(5)
    state = torch.get_rng_state()
    control, correlation = inside.control(network.model, x, pattern, layer, channel, "guided", unit)
    assert torch.equal(control, expected) and torch.equal(torch.get_rng_state(), state)
    if unit == "max":
        top, left, bottom, right = inside.smallest_box(pattern)
        pattern, control = (p[:, top:bottom, left:right] for p in (pattern, control))
    seen = pattern.abs().sum(0).bool() | control.abs().sum(0).bool()
    ranks = [scipy.stats.rankdata(p.abs().sum(0)[seen]) for p in (pattern, control)]
    assert correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)


def test_control_of_a_position_tells_another_image():
    """Any two patterns of one position fade towards the edge of what it sees: that is no correlation."""
    network = load_network(REFERENCE, "cifar10", torch.device("cpu"))
    x = network.preprocess(photograph()[0])
    (maps,) = inside.feature_maps(network.model, x, "conv4_x")
    arguments = "conv4_x", 7, "guided", int(maps[0, 7].argmax())
    pattern = inside.reconstruct(network.model, x, *arguments)
    other, correlation = inside.control(network.model, x.flip(3), pattern, *arguments)
    assert inside.rank_correlation(pattern, other) > 0.6 > 0.4 > correlation
    assert inside.control(network.model, x, pattern, *arguments)[1] > 0.6


def test_a_verdict_is_given_only_above_its_limit():
    verdict = "mostly shows edges and areas of the image itself"
    assert verdict in inside.describe_control("conv5_x", 0.61)
    assert verdict not in inside.describe_control("conv5_x", 0.6)
    assert "random weights in conv4_x and conv5_x: rank" in inside.describe_control("conv5_x.block1", 0.1)
    assert "random weights in conv1: rank" in inside.describe_control("conv1", 0.1)


def test_rank_correlation_is_not_raised_by_what_is_empty_in_both():
    torch.manual_seed(0)
    one, other = torch.zeros(2, 3, 64, 64)
    one[:, :16, :16], other[:, :16, :16] = torch.randn(2, 3, 16, 16)
    assert abs(inside.rank_correlation(one, other)) < 0.2  # with the empty pixels it would be 0.9
    assert inside.rank_correlation(one, torch.zeros_like(one)) == 0


def test_every_pattern_tells_its_largest_value(flags, tmp_path, monkeypatch):
    drawn, real = [], figures.pattern_image
    monkeypatch.setattr(figures, "pattern_image", lambda p: drawn.append(p.abs().max()) or real(p))
    texts = []
    monkeypatch.setattr(reconstruct, "save_figure", lambda figure, *rest: texts.append(labels_of(figure)))
    monkeypatch.setattr(sanity_check, "save_figure", lambda figure, *rest: texts.append(labels_of(figure)))
    reconstruct.main([*flags])
    reconstruct.main([*flags, "--layer", "conv2_x", "--unit", "max"])
    sanity_check.main([*flags, "--layer", "conv2_x"])
    assert len(drawn) == 2 + 2 + 9
    for value in drawn:
        assert f"full contrast ±{value:.2g}" in " ".join(texts)


def labels_of(figure):
    return " ".join(axes.get_xlabel() for axes in figure.axes)


def test_similarity_is_one_for_the_same_and_low_for_another():
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 32, 32)
    assert sanity_check.similarity(one, one) == (pytest.approx(1), pytest.approx(1))
    assert sanity_check.similarity(one, -one) == (pytest.approx(1), pytest.approx(1))  # magnitudes
    assert max(map(abs, sanity_check.similarity(one, other))) < 0.3


@pytest.mark.parametrize("layer", ["conv1", "conv2_x"])
def test_sanity_check_leaves_out_networks_whose_map_is_silent(layer, network, monkeypatch):
    x = network.preprocess(data.load("digits", "").test_images[0])
    real, seeds = inside.randomize, []

    def randomize(model, stages, seed):
        seeds.append(seed)
        made = real(model, stages, seed)
        if seed == 0:
            for norm in (m for m in made.get_submodule(layer).modules() if isinstance(m, nn.BatchNorm2d)):
                norm.bias = nn.Parameter(torch.full_like(norm.bias, -100))  # nothing passes the ReLU
        return made

    monkeypatch.setattr(inside, "randomize", randomize)
    (maps,) = inside.feature_maps(network.model, x, layer)
    (channel,) = inside.choose_maps(maps, "strongest:1")
    figure, lines, _ = sanity_check.compare(network.model, x, layer, channel, "a digit", seeds=2)
    assert max(seeds) >= 2 and all(" 0.00 " not in line for line in lines)
    FigureCanvasAgg(figure).draw()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 and title.x1 <= figure.bbox.width


@pytest.mark.parametrize("layer, count", [("conv5_x", 5), ("conv2_x", 2)])
def test_sanity_check_draws_and_prints_every_network(flags, tmp_path, capsys, layer, count):
    sanity_check.main([*flags, "--layer", layer])
    (path,) = (tmp_path / "figures").glob(f"sanity_{layer}_map*.png")
    drawn(tmp_path, path.name)
    lines = [line for line in capsys.readouterr().out.splitlines() if "rank correlation" in line]
    assert [line.split(",")[0] for line in lines] == ["gradient", "deconvnet", "guided"]
    for line in lines:
        numbers = [float(number) for number in re.findall(r" (-?\d\.\d\d)", line)]
        assert len(numbers) == 2 * count and all(-1 <= number <= 1 for number in numbers)
        assert min(numbers) < 0.99 and f"{layer} randomised" in line and "and conv1" in line


ALSO = pytest.mark.parametrize("label", [0, 3])


@pytest.fixture(scope="module")
def x(network):
    return network.preprocess(data.load("digits", "").test_images[5])


@ALSO
@pytest.mark.parametrize("layer", inside.STAGES)
def test_gradcam_of_every_stage_is_captums(network, x, layer, label):
    method = captum.attr.LayerGradCam(network.model, network.model.get_submodule(layer))
    expected = method.attribute(x, label, relu_attributions=True)[0, 0]
    ours = gradcam.gradcam(network.model, x, label, layer)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-6)


@ALSO
def test_integrated_gradients_are_captums_and_add_up(network, x, label):
    ours = attribution.integrated_gradients(network.model, x, label)
    expected = captum.attr.IntegratedGradients(network.model).attribute(x, target=label, n_steps=25)[0]
    assert ours.shape == (3, 32, 32) and (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    with torch.no_grad():
        logits = network.model(torch.cat((x, torch.zeros_like(x))))[:, label]
    many = attribution.integrated_gradients(network.model, x, label, steps=200)
    error = float(many.sum() - (logits[0] - logits[1]))
    assert abs(error) < 0.01 * float(many.abs().sum())


@ALSO
def test_smooth_grad_is_captums(network, x, label):
    model, x = copy.deepcopy(network.model).double(), x.double()  # rounding shows where a ReLU is near 0
    ours = attribution.smooth_grad(model, x, label)
    saliency, width = captum.attr.Saliency(model), 0.15 * float(x.max() - x.min())
    torch.manual_seed(0)  # the same noise
    options = dict(nt_type="smoothgrad", nt_samples=25, stdevs=width, target=label, abs=False)
    expected = captum.attr.NoiseTunnel(saliency).attribute(x, **options)[0]
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@ALSO
@pytest.mark.parametrize("side", [32, 64, 50])
def test_occlusion_is_captums(network, x, label, side):
    x = torch.nn.functional.interpolate(x, side)
    step = side // 14
    windows = dict(sliding_window_shapes=(3, 2 * step, 2 * step), strides=(3, step, step))
    expected = captum.attr.Occlusion(network.model).attribute(
        x, target=label, **windows, perturbations_per_eval=64
    )
    ours = attribution.occlusion(network.model, x, label)
    assert (ours - expected[0]).abs().max() <= 1e-4 * expected.abs().max()


def test_attribution_draws_a_row_for_each_class(flags, tmp_path, monkeypatch):
    found, real = [], attribution.save_figure
    monkeypatch.setattr(attribution, "save_figure", lambda *args: found.append(args[0]) or real(*args))
    attribution.main([*flags, "--image", "3", "--class", "4", "--class", "9"])
    drawn(tmp_path, "attribution.png")
    said = found[0].axes[0].get_ylabel().splitlines()[0]
    assert len([axes for axes in found[0].axes if axes.images]) == 5 * len({said, "4", "9"})
    assert labels_of(found[0]).count("evidence, largest ") == 4  # the scale of each method


def test_a_decision_adds_up_to_the_logits(network, x):
    labels = [5, 2]
    maps, logits, parts, strongest = decision.decide(network.model, x, labels)
    with torch.no_grad():
        expected = network.model(x)[0, labels]
    sums = parts.sum(1) + network.model.fc.bias.detach()[labels]
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    order = (parts[0] - parts[1]).argsort(descending=True)
    assert strongest == [*order[:3].tolist(), int(order[-1])]
    silent = maps.clone()
    silent[0, strongest[0]] = 0
    with torch.no_grad():  # a part is what the logit loses without its map
        without = network.model.fc(network.model.avgpool(silent))[0, labels]
    torch.testing.assert_close(expected - without, parts[:, strongest[0]], rtol=0, atol=1e-4)


def test_a_decision_is_against_what_the_image_is(network, flags, tmp_path, monkeypatch, capsys):
    images, labels = data.load("digits", "")[2:4]
    with torch.no_grad():
        predicted = network.model(network.preprocess(images)).argmax(1)
    wrong, right = (int(found.nonzero()[0]) for found in (predicted != labels, predicted == labels))
    decision.main([*flags, "--image", str(wrong)])
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if ": logit" in line or line.startswith("map ")]
    drawn(tmp_path, "decision.png")
    assert lines[0].startswith(f"{predicted[wrong]}: logit")
    assert lines[1].startswith(f"{labels[wrong]}: logit")
    assert len(lines) == 2 + 4
    monkeypatch.setattr(decision, "save_figure", lambda *args: None)  # which takes seconds
    said, flags = int(predicted[right]), [*flags, "--image", str(right)]
    decision.main([*flags, "--class", str((said + 3) % 10)])
    assert f"\n{(said + 3) % 10}: logit" in capsys.readouterr().out
    for names in [said], [(said + 1) % 10, (said + 2) % 10]:
        with pytest.raises(SystemExit):
            decision.main([*flags, *(word for name in names for word in ("--class", str(name)))])
        assert f"the network says {said}: --class takes one other class" in capsys.readouterr().err


def test_ablation_is_zeroing_the_map(network):
    images = data.load("digits", "").test_images[:100]
    with torch.no_grad():  # this network has learned little: let most of what it says be right
        labels = network.model(network.preprocess(images)).argmax(1)
    labels[::4] = torch.arange(25) % 10
    found = responses.strongest(network, images, precision="fp32")
    table, order, together = ablation.ablate(network.model, found["conv5_x"][3], labels)
    assert table.shape == (513, 11) and 0.75 <= table[0, 0] < 1 and (table[1:, 0] < table[0, 0]).sum() > 3

    def really(channels):
        def hook(module, args, output):
            output = output.clone()
            output[:, channels] = 0
            return output

        with torch.no_grad(), network.model.conv5_x.register_forward_hook(hook):
            right = (network.model(network.preprocess(images)).argmax(1) == labels).float()
        return torch.stack([right.mean(), *(right[labels == n].mean() for n in range(10))])

    torch.testing.assert_close(table[0], really([]))
    for channel in 0, 511, int(table[1:, 0].argmin()), int(table[1:, 0].argmax()):
        torch.testing.assert_close(table[1 + channel], really([channel]))
    assert sorted(order.tolist()) == list(range(512)) and len(together) == 513
    for count in 0, 1, 100, 400:
        assert float(really(order[:count])[0]) == pytest.approx(float(together[count]))


def test_ablation_counts_the_maps_that_nobody_would_miss():
    table, together = torch.full((5, 3), 0.9), torch.tensor([0.9, 0.9, 0.895, 0.7, 0.9])
    assert ablation.draw(["a", "b"], table, together)[1].startswith("2 of 4 maps")
    assert ablation.draw(["a", "b"], table, table[:, 0])[1].startswith("4 of 4 maps")


def test_ablation_writes_its_table(flags, tmp_path, capsys):
    ablation.main(flags)
    drawn(tmp_path, "ablation.png")
    with open(tmp_path / "figures/ablation.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["left out", "all", *map(str, range(10))] and len(rows) == 514
    assert [row[0] for row in rows[1:4]] == ["none", "0", "1"]
    assert all(0 <= float(value) <= 1 for row in rows[1:] for value in row[1:])
    assert "of 512 maps together cost at most a point of accuracy" in capsys.readouterr().out


class Brightness(torch.nn.Module):
    """Takes an image for class 1 as far as the middle of it is bright."""

    fc = torch.nn.Linear(1, 2)

    def forward(self, x):
        bright = x[:, :, 12:20, 12:20].mean((1, 2, 3))
        return torch.stack((-bright, bright), 1)


def test_deletion_blurs_what_has_most_evidence_first(network):
    network = network._replace(model=Brightness(), mean=(0.3,) * 3, std=(0.1,) * 3)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 12:20, 12:20] = 255
    evidence = torch.zeros(64, 64)
    evidence[24:40, 24:40] = 1 + torch.rand(16, 16)
    right, wrong = deletion.curve(network, image, evidence, 1), deletion.curve(network, image, -evidence, 1)
    assert len(right) == len(wrong) == deletion.STEPS + 1
    assert right[0] == wrong[0] > 0.99 and right[-1] == wrong[-1] < 0.9
    torch.testing.assert_close(
        right[1:], right[-1:].expand(16), rtol=0, atol=1e-5
    )  # all 64 in the first step
    torch.testing.assert_close(wrong[:-1], wrong[:1].expand(16), rtol=0, atol=1e-5)
    (area, spread, share), (other, _, same) = deletion.summary(
        {"right": torch.stack((right, right)), "random order": torch.stack((wrong, wrong))}
    ).values()
    assert area < other and spread == 0 and share == 1 and same == 0
    assert area == pytest.approx(float(scipy.integrate.trapezoid(right.numpy(), dx=1 / 16)), abs=1e-6)


def test_deletion_draws_and_writes_its_table(flags, tmp_path, capsys):
    deletion.main([*flags, "--count", "3"])
    drawn(tmp_path, "deletion.png")
    with open(tmp_path / "figures/deletion.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == [*attribution.METHODS, "random order"]
    assert all(0 <= float(value) <= 1 for row in rows[1:] for value in row[1:])
    assert rows[1][1] in capsys.readouterr().out


def test_evaluation_writes_the_mistakes(run, flags, tmp_path):
    train.main(["--evaluate", *flags, "--device", "cpu", "--precision", "fp32"])
    network = load_network(run / "weights.pt", "digits", torch.device("cpu"))
    images, labels = data.load("digits", "")[2:4]
    with torch.no_grad():
        logits = network.model(network.preprocess(images))
    confidence, predicted = logits.softmax(1).max(1)
    with open(tmp_path / "figures/mistakes.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["number"]) for row in rows} == set((predicted != labels).nonzero().flatten().tolist())
    for row in rows:
        number = int(row["number"])
        assert (row["class"], row["predicted"]) == (str(int(labels[number])), str(int(predicted[number])))
        assert float(row["confidence"]) == pytest.approx(float(confidence[number]), abs=1e-3)
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences, reverse=True)
    drawn(tmp_path, "mistakes.png")
    sheet = figures.mistakes(images, inside.mistakes(labels, logits, network.classes), "test", "a command")
    assert "a command tells why" in sheet.get_supxlabel()


def test_no_mistakes_make_an_empty_table():
    assert inside.mistakes(torch.tensor([0, 1]), torch.eye(2), ["a", "b"]) == []
    (row,) = inside.mistakes(torch.tensor([0, 0]), torch.eye(2), ["a", "b"])
    assert row[:3] == (1, "a", "b") and row[3] == pytest.approx(torch.eye(2).softmax(1)[0, 0].item())


@pytest.mark.parametrize(
    "script, words, message",
    [
        (attribution, "--class cat", "no class 'cat': --class takes 0, 1"),
        (decision, "--class cat", "no class 'cat': --class takes 0, 1"),
        (decision, "--image 360", "no test image 360: --image takes 0 to 359"),
        (deletion, "--count 0", "--count: 0 is not 1 or more"),
        (gradcam, "--layer top", "--layer: invalid choice: 'top'"),
    ],
)
def test_wrong_flags_get_one_line(flags, tmp_path, capsys, script, words, message):
    with pytest.raises(SystemExit) as stop:
        script.main([*flags, *words.split()])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and "\n" not in error
    assert not (tmp_path / "figures").exists()
