"""The network, against torchvision's own and the numbers of the paper's table."""

import pytest
import torch
import torchvision

import MyResnet
from MyResnet import ResNet18, from_torchvision, to_torchvision

STAGES = ("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x")


def pair(num_classes=10):
    """Ours and torchvision's with the same weights, batch norms that have seen data included."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=num_classes)
    theirs(torch.randn(4, 3, 64, 64))  # in training mode: moves the running statistics
    ours = ResNet18(num_classes)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return ours.double(), theirs.double()


def test_same_outputs_and_gradients_as_torchvision():
    ours, theirs = pair()
    for mode in (False, True):  # evaluation, training
        ours.train(mode), theirs.train(mode)
        x = torch.randn(2, 3, 64, 64, dtype=torch.double)
        y, expected = ours(x), theirs(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for model, out in ((ours, y), (theirs, expected)):
            model.zero_grad()
            out.square().sum().backward()
        gradients = from_torchvision({name: p.grad for name, p in theirs.named_parameters()})
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_weights_go_back_to_torchvision_unchanged():
    ours, theirs = pair(num_classes=7)
    back = to_torchvision(ours.state_dict())
    assert list(back) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_stages_have_the_sizes_of_the_papers_table():
    model = ResNet18().eval()
    x = torch.randn(1, 3, 224, 224)
    for name, shape in zip(
        STAGES,
        [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)],
    ):
        x = model.get_submodule(name)(x)
        assert x.shape == (1, *shape)
        assert x.min() >= 0  # after ReLU
    assert sum(p.numel() for p in model.parameters()) == 11_181_642


@pytest.mark.parametrize("size", [32, 33, 47])
def test_small_images_work(size):
    assert ResNet18(5).eval()(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_every_relu_is_a_module_used_once():
    model, uses = ResNet18(), []
    relus = [m for m in model.modules() if isinstance(m, torch.nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, args, output: uses.append(module))
    model(torch.randn(2, 3, 32, 32))
    assert len(relus) == len(uses) == len(set(uses)) == 17


def test_convolutions_start_as_he_et_al_say():
    torch.manual_seed(0)
    for module in ResNet18().modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            assert abs(module.weight.mean().item()) < 0.1 * (2 / fan_out) ** 0.5


def test_table_prints_the_known_totals(capsys):
    MyResnet.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["total", "11,181,642", "1,813,566,464"]
    stages = {line.split()[0]: line for line in lines[2:]}
    assert set(STAGES) < set(stages)
    assert "112×112×64" in stages["conv1"] and "7×7, 64, stride 2" in stages["conv1"]
    # by hand: 112² places, 7²×3 inputs, 64 outputs
    assert f"{112**2 * 7**2 * 3 * 64:,}" in stages["conv1"]
    assert "7×7×512" in stages["conv5_x"]
