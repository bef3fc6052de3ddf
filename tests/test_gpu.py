"""The path of a GPU, as far as it goes without one: fake tensors, which have a device and no values, and
stand-ins. An operation on two devices is an error for a fake tensor as it is on a GPU."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda._utils import _get_device_index

import train
from common import cli, data, device, inside
from common.cli import UserError
from common.device import select_device
from common.muon import Muon
from common.network import Network
from extras import gradcam, maximize
from MyResnet import ResNet18

GPU = torch.device("cuda", 0)
PIXELS = dict(mean=(0.5,) * 3, std=(0.2,) * 3)


def gradients(outputs, inputs, signals=None, **options):
    """Stands in for `torch.autograd.grad`, which needs a real GPU. What it is given must fit together."""
    pairs = [(t, t if s is None else s) for t, s in zip(listed(outputs), listed(signals) or [None])]
    assert all((t.device, t.shape, t.dtype) == (s.device, s.shape, s.dtype) for t, s in pairs)
    assert all(t.requires_grad and t.device == GPU for t in (*listed(outputs), *listed(inputs)))
    return [torch.zeros_like(t) for t in listed(inputs)]


def listed(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


@pytest.fixture
def gpu(monkeypatch):
    """Tensors have no values, and may be on "cuda"."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    for module in train, maximize:  # what reads a value, of which there are none
        monkeypatch.setattr(module, "float", lambda tensor: 0.5, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.nn.Conv2d(3, 4, 3, device=GPU)(torch.ones(1, 3, 9, 9).to(GPU))
        except RuntimeError:
            pytest.skip("this PyTorch has no fake GPU on a machine without one")
        yield


@pytest.fixture
def images(gpu):
    return torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device=GPU)


@pytest.fixture
def network(gpu):
    with GPU:
        model = ResNet18(10).eval()
    return Network(model, **PIXELS, classes=data.CIFAR10_CLASSES, size=64)


def test_what_mixes_devices_is_noticed(images):
    def normalize(images):
        return (images.float() - torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1)) / 0.2  # on the CPU

    with pytest.raises(RuntimeError, match="two.* devices,? cuda:0,? (and )?cpu"):
        normalize(images)
    with pytest.raises(AssertionError):
        gradients(torch.ones(2, device=GPU, requires_grad=True), [], torch.ones(2))


def test_batches_are_made_and_resized_on_the_gpu(images):
    (batch, _) = data.epoch_batches(20, 8, seed=0, epoch=0, shift=4, flip=True, device=GPU)
    assert {part.device for part in batch} == {GPU}
    cropped = data.augment(images, batch)
    assert cropped.device == GPU and cropped.is_contiguous(memory_format=torch.channels_last)
    x = data.normalize_and_resize(cropped, 64, **PIXELS)
    assert (x.device, x.shape, x.dtype) == (GPU, (8, 3, 64, 64), torch.float32)


@pytest.mark.parametrize("layer", ["conv1", "conv5_x"])
def test_looking_inside_stays_on_the_gpu(layer, network, images):
    x = network.preprocess(images[0])
    (maps,) = inside.feature_maps(network.model, x, layer)
    assert maps.device == inside.mean_activations(maps).device == GPU
    for method in inside.RELU_BACKWARD:
        for unit in "map", 3:
            pattern = inside.reconstruct(network.model, x, layer, 1, method, unit)
            assert pattern.device == GPU and pattern.shape == (3, 64, 64)
    assert inside.class_gradients(network.model, x, 3).device == GPU
    assert gradcam.gradcam(network.model, x, 3, layer).device == GPU


def test_activation_maximisation_stays_on_the_gpu(network, monkeypatch):
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0.5] * len(tensor))
    image, activation = maximize.maximize(network, "conv3_x", 7, steps=2)
    assert image.device == GPU and image.shape == (3, 64, 64) and activation == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_and_an_evaluation_stay_on_the_gpu(precision, network, images, monkeypatch):
    """The backward pass is PyTorch's; what it gets, and what is done with what it gives, is ours."""
    model, labels = network.model.train(), torch.zeros(20, dtype=torch.long, device=GPU)
    logits, losses = [], []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))
    settings = train.STANDARD | dict(precision=precision)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    for batch in data.epoch_batches(20, 10, seed=0, epoch=0, shift=4, flip=True, device=GPU):
        result = train.backward(model, images, labels, batch, 64, settings, scaler, micro_batches=2)
        assert result.device == GPU
    assert [loss.device for loss in losses] == [GPU] * 4
    assert {(y.device, y.dtype) for y in logits} == {(GPU, device.DTYPES.get(precision, torch.float32))}
    convolutions = [p for p in model.parameters() if p.ndim == 4]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Muon(convolutions, lr=0.1, momentum=0.9, precision=precision).step()
    assert {p.device for p in convolutions} == {GPU}

    monkeypatch.setattr(train, "fuse", lambda model: model)  # it cannot copy fake tensors
    loss, accuracy, logits = train.evaluate(model, images, labels, 64, settings)
    assert (logits.device, logits.shape, logits.dtype) == (GPU, (20, 10), torch.float32)


def test_step_whose_fp16_gradients_overflow_is_left_out_of_both_optimizers():
    weights = [torch.nn.Parameter(torch.ones(4, 3, 3, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizers = Muon(weights[:1], 0.1, 0.9, "fp16"), torch.optim.SGD(weights[1:], 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")

    def step(gradient):
        before, scale = [weight.detach().clone() for weight in weights], scaler.get_scale()
        scaler.scale(torch.zeros(()))  # makes the scale
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient * scale)
        for optimizer in optimizers:  # as train.py does
            scaler.step(optimizer)
        scaler.update()
        return [
            not torch.equal(weight, old) for weight, old in zip(weights, before)
        ], scaler.get_scale() / scale

    assert step(float("inf")) == ([False, False], 0.5)
    assert step(0.1) == ([True, True], 1)
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 8.9 GB, other allocations: 1 GB, max allowed: 9 GB)",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you",
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to",
    ],
)
def test_memory_is_refused_in_many_words(message, capsys):
    def fail(argv):
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as stop:
        cli.command(fail)([])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: not enough memory for this")
    assert not cli.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.fixture
def accelerator(monkeypatch):
    """Lets PyTorch find accelerators of a type, that many of them."""

    def found(kind, count):
        class Module:
            device_count = staticmethod(lambda: count)

        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch, "get_device_module", lambda device: Module)

    found.current = current = []  # as PyTorch's own takes them, which raises for a device without an index
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_get_device_index(device)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


@pytest.mark.parametrize(
    "kind, count, name, expected",
    [
        ("cuda", 2, "auto", "cuda"),
        ("cuda", 2, "cuda:1", "cuda:1"),
        ("cuda", 2, "cuda:2", "no device 'cuda:2' on this machine: --device takes cuda, cpu"),
        ("cuda", 2, "mps", "no device 'mps' on this machine: --device takes cuda, cpu"),
        ("mps", 1, "auto", "mps"),
        ("mps", 1, "cuda", "no device 'cuda' on this machine: --device takes mps, cpu"),
        ("xpu", 1, "auto", "cpu"),  # not one that was tried
        ("cuda", 0, "auto", "cpu"),
        ("cuda", 0, "cuda", "no device 'cuda' on this machine: --device takes cpu"),
    ],
)
def test_the_device_is_the_accelerator_that_is_there(kind, count, name, expected, accelerator):
    accelerator(kind, count)
    if expected.startswith("no device"):
        with pytest.raises(UserError, match=expected):
            select_device(name)
    else:
        assert select_device(name) == torch.device(expected)
        assert torch.backends.cudnn.benchmark
        assert accelerator.current == ([1] if expected == "cuda:1" else [])


def test_each_process_of_torchrun_has_its_own_gpu(accelerator, monkeypatch):
    accelerator("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("auto") == torch.device("cuda")  # it is left over from something else
    for name in "MASTER_ADDR", "RANK", "WORLD_SIZE":
        monkeypatch.setenv(name, "1")
    accelerator.current.clear()
    assert select_device("auto") == select_device("cuda") == torch.device("cuda:1")
    assert accelerator.current == [1, 1]
    assert select_device("cuda:0") == torch.device("cuda:0") and select_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no device 'cuda:2' on this machine"):
        select_device("auto")


def test_apple_gpus_have_the_usual_memory_format():
    assert isinstance(device.autocast(torch.device("mps"), "fp32"), contextlib.nullcontext)  # no warning
    assert device.memory_format(torch.device("mps")) == torch.contiguous_format
    assert device.memory_format(GPU) == device.memory_format(torch.device("cpu")) == torch.channels_last
    with pytest.raises(UserError, match="mps lacks"):
        device.select_precision("fp16", torch.device("mps"))
