"""Looking inside, against Captum and autograd."""

import captum.attr
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.models.feature_extraction import create_feature_extractor

from common import checkpoint, data, inside
from common.cli import UserError
from common.images import crop_and_shrink
from common.network import REFERENCE, load_network
from MyResnet import ResNet18, to_torchvision


@pytest.fixture(scope="module")
def model():
    """A network whose batch norms have seen data, so that no map is all negative or all positive."""
    torch.manual_seed(0)
    model = ResNet18()
    for _ in range(20):
        model(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


CAPTUM = {
    "gradient": captum.attr.NeuronGradient,
    "guided": captum.attr.NeuronGuidedBackprop,
    "deconvnet": captum.attr.NeuronDeconvolution,
}


@pytest.mark.parametrize("unit", ["map", "max", "median"])
@pytest.mark.parametrize(
    "layer", ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "conv3_x.block1.conv2"]
)
@pytest.mark.parametrize("method", CAPTUM)
def test_reconstructions_are_captums(model, x, layer, method, unit):
    assert_captums(model, x, layer, method, unit)


@pytest.mark.parametrize("method", CAPTUM)
def test_reconstructions_of_the_reference_network_are_captums(method):
    network = load_network(REFERENCE, "cifar10", torch.device("cpu"))
    flower = crop_and_shrink(Image.fromarray(load_sample_image("flower.jpg")))
    assert_captums(network.model, network.preprocess(flower), "conv5_x", method, "map")


def assert_captums(model, x, layer, method, unit):
    (maps,) = inside.feature_maps(model, x, layer)
    (number,) = inside.choose_maps(maps, "strongest:1")
    signal = maps.detach()[:, number].clone()
    if unit == "median":  # a position that responds, and is not the strongest
        unit = int((signal == signal[signal > 0].median()).flatten().nonzero()[0])
    if unit != "map":
        row, column = divmod(int(signal.argmax()) if unit == "max" else unit, signal.shape[2])
        signal = torch.zeros_like(signal)
        signal[0, row, column] = maps.detach()[0, number, row, column]
    expected = CAPTUM[method](model, model.get_submodule(layer)).attribute(
        x, lambda a: (a[:, number] * signal).sum((1, 2))
    )[0]
    pattern = inside.reconstruct(model, x, layer, number, method, unit)
    assert expected.abs().max() > 0
    assert (pattern - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_three_methods_differ(model, x):
    gradient, guided, deconvnet = (
        inside.reconstruct(model, x, "conv3_x", 3, method) for method in inside.RELU_BACKWARD
    )
    assert not torch.allclose(gradient, guided, rtol=0.1)
    assert not torch.allclose(guided, deconvnet, rtol=0.1)


def test_no_hook_is_left_behind(model, x):
    before = model(x)
    inside.reconstruct(model, x, "conv5_x", 0)
    with pytest.raises(UserError):
        inside.reconstruct(model, x, "conv1", 64)
    with pytest.raises(RuntimeError):
        inside.feature_maps(model, torch.zeros(1, 5, 32, 32), "conv1")
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks
    assert torch.equal(model(x), before)


def test_feature_maps_are_those_of_torchvision(model, x):
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(to_torchvision(model.state_dict()))
    extract = create_feature_extractor(
        theirs.eval(), {"relu": "conv1", "layer1": "conv2_x", "layer4": "conv5_x"}
    )
    with torch.no_grad():
        expected = extract(x)
        for name, maps in zip(expected, inside.feature_maps(model, x, *expected)):
            torch.testing.assert_close(maps, expected[name], rtol=1e-4, atol=1e-4)


def test_strongest_map_has_the_highest_mean():
    maps = torch.zeros(1, 5, 4, 4)
    maps[0, 2] = 1.0
    maps[0, 4, 0, 0] = 15.0  # a higher peak, a lower mean
    assert inside.choose_maps(maps, "strongest:1") == [2]
    assert inside.choose_maps(maps, "4") == [4]
    assert inside.mean_activations(maps).tolist() == [0, 0, 1, 0, 15 / 16]
    with pytest.raises(UserError, match="no map 5.*0 to 4"):
        inside.choose_maps(maps, "5")


def test_receptive_fields_are_the_papers_and_hold_the_pattern(model):
    expected = dict(conv1=(7, 2), conv2_x=(43, 4), conv3_x=(99, 8), conv4_x=(211, 16), conv5_x=(435, 32))
    x = torch.randn(1, 3, 480, 480, generator=torch.Generator().manual_seed(2))
    for layer, (size, step) in expected.items():
        assert inside.receptive_field(model, layer) == (size, step)
        (maps,) = inside.feature_maps(model, x, layer)
        place = divmod(int(maps[0, 5].argmax()), maps.shape[3])
        pattern = inside.reconstruct(model, x, layer, 5, "gradient", "max").abs().amax(0)
        rows, columns = (torch.nonzero(pattern.amax(axis)).flatten() for axis in (1, 0))
        for centre, seen in zip(place, (rows, columns)):
            assert seen.min() >= (low := max(0, step * centre - size // 2))
            assert seen.max() <= (high := min(479, step * centre + size // 2))
            assert len(seen) > 0.7 * (high - low) or size > 200  # it fills the field, or nearly
    assert inside.receptive_field(model, "conv3_x.block1.conv1") == (51, 8)


def test_smallest_box_is_the_smallest():
    torch.manual_seed(0)
    for _ in range(5):
        pattern = torch.randn(3, 9, 7) ** 5
        energy = pattern.square().sum(0)
        boxes = [
            (top, left, bottom, right)
            for top in range(9) for bottom in range(top + 1, 10)
            for left in range(7) for right in range(left + 1, 8)
            if energy[top:bottom, left:right].sum() >= 0.9 * energy.sum()
        ]  # fmt: skip
        areas = [(bottom - top) * (right - left) for top, left, bottom, right in boxes]
        top, left, bottom, right = box = inside.smallest_box(pattern)
        assert box in boxes and (bottom - top) * (right - left) == min(areas)
    assert inside.smallest_box(torch.zeros(3, 4, 5)) == (0, 0, 4, 5)


def test_maps_can_be_named(model, x):
    (maps,) = inside.feature_maps(model, x, "conv2_x")
    order = inside.mean_activations(maps).argsort(descending=True).tolist()
    assert inside.choose_maps(maps, "strongest:3") == order[:3]
    assert inside.choose_maps(maps, "7,43") == [7, 43]
    for wrong in ("64", "strongest:0", "strongest:65", "best", "", "1,,2", "-1"):
        with pytest.raises(UserError, match="--map takes"):
            inside.choose_maps(maps, wrong)
    with pytest.raises(UserError, match="no layer 'conv9' with maps: --layer takes conv1, conv2_x"):
        inside.check_layer(model, "conv9")
    with pytest.raises(UserError, match="no layer 'fc' with maps"):
        inside.check_layer(model, "fc")


def test_weights_of_before_the_renaming_are_opened(tmp_path, model):
    """The keys that weights on people's disks have: as a dictionary, not as today's code writes it."""
    old = dict(
        classes=data.CIFAR10_CLASSES, source="CIFAR-10 as jpg pictures", settings=dict(pictures=50_000),
        model={name: t.half() if t.ndim > 1 else t for name, t in model.state_dict().items()},
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), size=64, accuracy=0.9,
    )  # fmt: skip
    torch.save(old, tmp_path / "old.pt")
    network = load_network(tmp_path / "old.pt", "cifar10", torch.device("cpu"))
    assert network[1:] == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), data.CIFAR10_CLASSES, 64, False)
    assert torch.equal(network.model.fc.weight, model.fc.weight.half().float())


def test_weights_come_back_as_saved(run):
    network = load_network(run / "weights.pt", "digits", torch.device("cpu"))
    saved = torch.load(run / "weights.pt", weights_only=True)
    assert network.classes == [str(digit) for digit in range(10)] and network.size == 32
    trained = torch.load(run / "last.pt", weights_only=True)["model"]
    for name, tensor in network.model.state_dict().items():
        half = saved["model"][name]
        assert half.dtype == (torch.float16 if tensor.ndim > 1 else tensor.dtype)
        assert torch.equal(tensor, half.to(tensor.dtype)), name
        torch.testing.assert_close(tensor, trained[name], rtol=1e-3, atol=1e-7)
    assert not network.model.training


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="cannot write .*last.pt .No space left on device"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
