"""Any ResNet-18: what it comes in, how it sees photographs, and that what these scripts find in it is what
torchvision and Captum find in torchvision's own network."""

import copy
import types
from unittest import mock

import captum.attr
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import test_featuremaps
import train
from common import checkpoint, images, inside, responses, weights
from common.cli import UserError
from common.network import REFERENCE, load_network
from extras import gradcam, maximize, reconstruct, sanity_check, top_pictures
from MyResnet import from_torchvision, to_torchvision

CPU = torch.device("cpu")
CAPTUM = dict(guided=captum.attr.GuidedBackprop, deconvnet=captum.attr.Deconvolution)
STAGES = dict(conv1="relu", conv2_x="layer1", conv3_x="layer2", conv4_x="layer3", conv5_x="layer4")


def basic_block(self, x):
    """As torchvision's forward pass, with another module for the second ReLU: Captum needs that."""
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


def theirs(classes, state=None):
    """torchvision's resnet18 with 1,000 or 10 classes, whose batch norms have seen data or have `state`."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=classes)
    if state:
        model.load_state_dict(state)
    else:
        model(torch.randn(4, 3, 64, 64))
    for module in model.modules():
        if isinstance(module, torchvision.models.resnet.BasicBlock):
            module.relu2, module.forward = nn.ReLU(), types.MethodType(basic_block, module)
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.eval()


def state_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "relu" not in name}


@pytest.fixture(scope="module")
def references():
    shipped = torch.load(REFERENCE, weights_only=True)["model"]
    shipped = {name: tensor.float() for name, tensor in to_torchvision(shipped).items()}
    return {1000: theirs(1000), 10: theirs(10, shipped)}


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A file with a photograph, 300 by 451 pixels."""
    from skimage.data import chelsea

    path = tmp_path_factory.mktemp("photographs") / "cat.png"
    Image.fromarray(chelsea()).save(path)
    return path


class Stage(nn.Module):
    """torchvision's network up to one of its modules, and what the pattern of a map is the gradient of."""

    def __init__(self, model, module, channel, signal):
        super().__init__()
        self.network = create_feature_extractor(model, {module: "maps"})
        self.channel, self.signal = channel, signal

    def forward(self, x):
        return (self.network(x)["maps"][:, self.channel] * self.signal).sum((1, 2))[:, None]


FORMS = {  # what a state dict comes in
    "plain": lambda state: state,
    "state_dict": lambda state: dict(epoch=3, state_dict=state),
    "with classes": lambda state: dict(model=state, classes=["ant", "bee"], size=64, mean=None),
    "model": lambda state: dict(optimizer=dict(state={}, param_groups=[]), model=state),
    "nested": lambda state: dict(checkpoint=dict(ema=None, net=state)),
    "parallel": lambda state: dict(state_dict={f"module.{k}": v for k, v in state.items()}),
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "lightning": lambda state: dict(state_dict={f"model.module.{k}": v for k, v in state.items()}),
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    "bf16": lambda state: {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()},
    "ours": lambda state: from_torchvision(state),
    "without counts": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("form, classes", [("plain", 1000), *((form, 10) for form in FORMS)])
def test_every_form_gives_torchvisions_logits(form, classes, references, tmp_path):
    reference = references[classes]
    state = FORMS[form](state_of(reference))
    torch.save(state, tmp_path / "x.pt")
    network = load_network(tmp_path / "x.pt", "cifar10", CPU)
    if form in ("half", "bf16"):
        reference = theirs(classes, {k: v.float() for k, v in state.items()})
    assert_same_logits(network.model, reference, torch.randn(1, 3, 64, 64))
    assert network.classes[1] == ("goldfish" if classes == 1000 else "class 1")


def test_a_photograph_like_a_ribbon_does_not_fill_the_memory(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda image, size, *rest, **more: sizes.append(size) or resize(image, size, *rest, **more),
    )
    for ribbon in (8000, 1), (1, 8000):
        assert images.crop_and_shrink(Image.new("RGB", ribbon, "red"), 224).shape == (3, 224, 224)
    assert sizes and max(max(size) for size in sizes) <= 8 * 256


def assert_same_logits(model, reference, x):
    with torch.no_grad():
        expected = reference(x)
        assert (model(x) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("classes", [1000, 10])
def test_a_photograph_is_seen_as_by_torchvision(classes, references, photograph, tmp_path):
    torch.save(state_of(references[classes]), tmp_path / "x.pt")
    network = load_network(tmp_path / "x.pt", "cifar10", CPU)
    transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected_input = transforms(Image.open(photograph))[None]
    x = network.preprocess(images.read_image(photograph, network.crop))
    one_grey_level = 1 / 255 / 0.224
    assert x.shape == (1, 3, 224, 224) and (x - expected_input).abs().max() <= one_grey_level
    assert_same_logits(network.model, references[classes], x)


def test_safetensors(references, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file(state_of(references[10]), tmp_path / "x.safetensors")
    network = load_network(tmp_path / "x.safetensors", "cifar10", CPU)
    assert torch.equal(network.model.fc.weight, references[10].fc.weight)
    (tmp_path / "x.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="is not a .safetensors file, or is damaged"):
        weights.read(tmp_path / "x.safetensors")


def test_our_own_network_goes_on_seeing_small_images(run, photograph):
    for path in REFERENCE, run / "weights.pt", run / "last.pt":
        network = load_network(path, "cifar10", CPU)
        assert images.read_image(photograph, network.crop).shape == (3, 32, 32)
    assert load_network(run / "last.pt", "digits", CPU).classes[3] == "3"


OTHERS = {
    "it also has layer1.2.conv1.weight": torchvision.models.resnet34,
    "layer1.0.conv1.weight is 64×64×1×1, not 64×64×3×3": torchvision.models.resnet50,
    "it has no conv1.weight": torchvision.models.mobilenet_v3_small,
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_network_is_refused_with_the_layer_that_differs(difference, tmp_path):
    with torch.device("meta"):
        state = OTHERS[difference]().state_dict()
    zero = torch.zeros(())  # of which any shape is a view: a small file
    torch.save({name: zero.expand(tensor.shape) for name, tensor in state.items()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=difference):
        weights.read(tmp_path / "x.pt")


def test_a_3x3_stem_and_weights_that_are_not_finite_are_refused(references, tmp_path):
    state = state_of(references[10])
    torch.save(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="conv1.weight is 64×3×3×3, not 64×3×7×7"):
        weights.read(tmp_path / "x.pt")
    torch.save(state | {"fc.bias": torch.full((10,), torch.nan)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="weights that are not finite"):
        weights.read(tmp_path / "x.pt")


def test_imagenet_is_torchvisions_or_one_line(references, monkeypatch):
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: state_of(references[1000]))
    network = load_network("imagenet", "cifar10", CPU)
    assert network.classes == enum.IMAGENET1K_V1.meta["categories"] and network.photographs

    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(enum, "get_state_dict", offline)
    with pytest.raises(UserError, match="cannot be downloaded .no route.*resnet18-.*pth elsewhere"):
        load_network("imagenet", "cifar10", CPU)


def test_flags_tell_what_a_state_dict_does_not(references, photograph, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(state_of(references[10]), "x.pt")
    (tmp_path / "names.txt").write_text("\n".join(f"name {n}" for n in range(10)), encoding="utf-8")
    flags = "--weights x.pt --classes names.txt --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --size 96".split()
    seen = []
    monkeypatch.setattr(inside, "feature_maps", lambda model, x, *layers: seen.append(x) or [])
    test_featuremaps.main([*flags, "--image", str(photograph)])
    assert seen[0].shape == (1, 3, 96, 96) and seen[0].min() >= -1 and seen[0].max() <= 1
    assert "the network says name " in capsys.readouterr().out
    for wrong, message in (
        (["--image", "3"], "no test image 3 for a network of photographs"),
        (["--classes", str(photograph)], "cannot be read as text"),
        (["--classes", "none.txt"], "none.txt cannot be read"),
    ):
        with pytest.raises(SystemExit):
            test_featuremaps.main([*flags, *wrong])
        assert message in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("cat\ndog", encoding="utf-8")
    with pytest.raises(SystemExit):
        test_featuremaps.main(flags)
    assert "x.pt knows 10 classes, there are 2 names of classes" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize("method", inside.RELU_BACKWARD)
def test_reconstructions_are_captums_on_torchvisions_network(method, classes, references, tmp_path):
    torch.save(state_of(references[classes]), tmp_path / "x.pt")
    network = load_network(tmp_path / "x.pt", "cifar10", CPU, size=96)
    x = network.preprocess(images.photograph(network.crop)[0]).double()
    # In float32, rounding decides whether an activation near zero passes its gradient on.
    reference = copy.deepcopy(references[classes]).double()
    network.model.double()
    for layer, module in STAGES.items():
        (maps,) = inside.feature_maps(network.model, x, layer)
        (channel,) = inside.choose_maps(maps, "strongest:1")
        pattern = inside.reconstruct(network.model, x, layer, channel, method)
        stage = Stage(reference, module, channel, maps.detach()[:, channel])
        if method == "gradient":
            leaf = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(stage(leaf).sum(), leaf)
        else:
            expected = CAPTUM[method](stage).attribute(x.clone(), target=0)
        scale = expected.abs().max()
        assert scale > 0 and (pattern - expected[0]).abs().max() <= 1e-5 * scale, layer


@pytest.mark.parametrize("classes", [1000, 10])
def test_gradcam_is_captums_on_torchvisions_network(classes, references, tmp_path):
    torch.save(state_of(references[classes]), tmp_path / "x.pt")
    network = load_network(tmp_path / "x.pt", "cifar10", CPU)
    x = network.preprocess(images.photograph(network.crop)[0])
    method = captum.attr.LayerGradCam(references[classes], references[classes].layer4)
    expected = method.attribute(x, 3, relu_attributions=True)[0, 0].detach()
    evidence = gradcam.gradcam(network.model, x, 3)
    assert (evidence - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6)


def test_every_script_that_looks_inside_takes_it(references, photograph, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=state_of(references[1000])), "x.pth")
    flags = ["--weights", "x.pth", "--size", "64"]
    for script, more in (
        (reconstruct, ["--image", str(photograph)]),
        (gradcam, []),  # of the cat
        (maximize, ["--steps", "1", "--layer", "conv1"]),
    ):
        assert not script.main([*flags, *more])
    assert not sanity_check.main([*flags, "--layer", "conv1"])
    names = {path.stem.partition("_")[0] for path in (tmp_path / "figures").iterdir()}
    assert names == {"recon", "gradcam", "maximize", "sanity"}


def test_the_nine_of_a_folder_of_photographs(references, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(state_of(references[10]), "x.pth")
    generator = np.random.default_rng(0)
    for n in range(11):
        folder = tmp_path / "photos" / f"class{n % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{n:02}.png")
    (tmp_path / "photos/.hidden.png").write_bytes(b"")
    (tmp_path / "photos/class0").rename(tmp_path / "elsewhere")  # and a link in its place
    (tmp_path / "photos/class0").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "photos")
    found = images.Photographs("photos", 64)
    assert len(found) == 11 and found.name(0) == "class0" and found[0].shape == (3, 64, 64)
    flags = "--weights x.pth --size 64 --data photos --layer conv2_x --map 3".split()
    assert not top_pictures.main(flags)
    network = load_network("x.pth", "cifar10", CPU, size=64)
    values, indices, _, means = responses.strongest(network, found, batch=4, precision="fp32")["conv2_x"]
    with torch.no_grad():
        (maps,) = inside.feature_maps(network.model, network.preprocess(found[7]), "conv2_x")
    assert means[3, 7] == pytest.approx(float(maps[0, 3].mean()), rel=1e-4)
    with torch.no_grad():
        each = [inside.feature_maps(network.model, network.preprocess(p), "conv2_x")[0] for p in found]
    peaks = [float(maps[0, 3].max()) for maps in each]
    assert values[3].tolist() == pytest.approx(sorted(peaks, reverse=True)[:9], rel=1e-4)
    monkeypatch.setattr(responses, "strongest", lambda *args, **options: pytest.fail("searched again"))
    assert not top_pictures.main(flags)


def test_training_starts_from_other_weights_and_says_so(run, tmp_path, capsys, monkeypatch):
    small = "--dataset digits --limit 32 --batch-size 16 --epochs 1 --size 32 --no-visdom --device cpu"
    flags = [*small.split(), "--precision", "fp32", "--out", str(tmp_path / "run"), "--lr", "0"]
    assert not train.main([*flags, "--init", str(run / "weights.pt")])
    assert f"from the weights in {run / 'weights.pt'}" in capsys.readouterr().out
    new = torch.load(tmp_path / "run/last.pt", weights_only=True)
    old = torch.load(run / "weights.pt", weights_only=True)
    for name in "conv1.conv.weight", "fc.weight":  # at a rate of 0 they stay
        torch.testing.assert_close(new["model"][name], old["model"][name].float())
    assert new["settings"]["init"] == str(run / "weights.pt")
    assert not train.main(["--resume", *flags])
    assert f"from the weights in {run / 'weights.pt'}" in capsys.readouterr().out

    torch.save(state_of(theirs(1000)), tmp_path / "x.pth")  # other classes: fc starts anew
    assert not train.main([*flags, "--init", str(tmp_path / "x.pth")])
    new = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    assert new["fc.weight"].shape == (10, 512)
    torch.testing.assert_close(new["conv1.conv.weight"], theirs(1000).conv1.weight)
    with pytest.raises(SystemExit):
        train.main([*flags, "--init", str(tmp_path / "none.pth")])
    assert "no weights in" in (error := capsys.readouterr().err) and "--init names others" in error


def test_shipped_weights_begin_at_their_accuracy():
    from common.run import Run

    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=random)
    network = load_network(REFERENCE, "cifar10", CPU)
    labels = torch.zeros(4, dtype=torch.long)
    dataset = train.data.Dataset(pixels, labels, pixels, labels, network.classes, "noise")
    settings = train.new_settings(train.parse(["--size", "64", "--precision", "fp32"]), CPU)
    run = Run(settings, dataset, REFERENCE.parent, CPU, init=weights.read(REFERENCE)[0])
    _, _, logits = train.evaluate(run.model, pixels, labels, 64, settings)
    with torch.no_grad():
        expected = network.model(network._replace(size=64).preprocess(pixels))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_memory_refused_while_loading_is_no_damage(monkeypatch):
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        checkpoint.load(REFERENCE)
