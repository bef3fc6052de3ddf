"""Looking inside, against Captum and autograd."""

import captum.attr
import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from common import checkpoint, inside
from common.cli import UserError
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
    return torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))


CAPTUM = {
    "gradient": captum.attr.NeuronGradient,
    "guided": captum.attr.NeuronGuidedBackprop,
    "deconvnet": captum.attr.NeuronDeconvolution,
}


@pytest.mark.filterwarnings("ignore:Setting .* hooks", "ignore:Input Tensor 0")
@pytest.mark.parametrize("layer", ["conv1", "conv3_x", "conv5_x"])
@pytest.mark.parametrize("method", CAPTUM)
def test_reconstructions_are_captums(model, x, layer, method):
    (maps,) = inside.feature_maps(model, x, layer)
    a0, number = maps.detach(), inside.choose_map(maps)
    expected = CAPTUM[method](model, model.get_submodule(layer)).attribute(
        x, lambda a: (a[:, number] * a0[:, number]).sum((1, 2))
    )[0]
    pattern = inside.reconstruct(model, x, layer, number, method)
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
    assert inside.choose_map(maps) == 2
    assert inside.choose_map(maps, 4) == 4
    assert inside.strengths(maps).tolist() == [0, 0, 1, 0, 15 / 16]
    with pytest.raises(UserError, match="no map 5.*0 to 4"):
        inside.choose_map(maps, 5)


def test_weights_come_back_as_saved(run, tmp_path):
    network = inside.load_network(run / "weights.pt", "digits", torch.device("cpu"))
    saved = torch.load(run / "weights.pt", weights_only=True)
    assert network.classes == [str(digit) for digit in range(10)] and network.size == 32
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
    assert not network.model.training
    halves = {name: t.half() if t.is_floating_point() else t for name, t in saved["model"].items()}
    checkpoint.save(saved | {"model": halves}, tmp_path / "half.pt")
    half = inside.load_network(tmp_path / "half.pt", "digits", torch.device("cpu"))
    assert half.model.fc.weight.dtype == torch.float32
    assert torch.equal(half.model.fc.weight, halves["fc.weight"].float())


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
