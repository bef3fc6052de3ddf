"""Where the network computes, and how: the device, its precision and memory format, and the allocator."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import torch

from common.cli import UserError, by_torchrun


def select_device(name):
    """The torch device of that name, or for "auto" the accelerator that PyTorch finds (cuda or mps), else the
    cpu. Also sets what makes it fast. Raises `UserError` if there is no such device."""
    counts = {"cpu": 1}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator and accelerator.type in ("cuda", "mps"):
        counts = {accelerator.type: torch.get_device_module(accelerator).device_count()} | counts
    try:
        device = torch.device(next(iter(counts)) if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f"no device {name!r} on this machine: --device takes {', '.join(counts)}")
    if device.type == "cuda" and device.index is None and by_torchrun() and "LOCAL_RANK" in os.environ:
        return select_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else PyTorch answers for the first one, as about bf16
    torch.backends.cudnn.benchmark = True  # there are few image sizes: let cuDNN time its algorithms for each
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # By default glibc maps every large activation anew from the kernel, page by page, at every step: half
        # the time of a training step goes there. Make it keep what is freed.
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not given back
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap, so that every thread finds what another freed
    return device


def describe(device):
    """The device in words: "NVIDIA H200", or the processor's name and how many threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux tells it there
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}"
    return f"{name}, {'its GPU' if device.type == 'mps' else threads}"


def select_precision(name, device):
    """The number format for training on `device`: "fp32", "bf16" or "fp16". "auto" is bf16 where the hardware
    computes with it, fp16 on older CUDA devices, else fp32. Raises `UserError`."""
    if name == "fp16" and device.type == "mps":
        raise UserError("--precision fp16 needs a gradient scaler, which mps lacks: take fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bf16"
    return "fp32"


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """The context in which the network computes with that precision."""
    if precision == "fp32":  # on Apple GPUs, PyTorch 2.6 to 2.9 warn of autocast even if it is switched off
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def memory_format(device):
    """Channels last, except on Apple GPUs: there the backward pass of batch norm is wrong with it
    (https://github.com/pytorch/pytorch/issues/175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
