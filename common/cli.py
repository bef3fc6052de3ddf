"""How every script starts: flags that mean the same everywhere, one line for an error that the user
can mend, and the device with its precision."""

import argparse
import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import signal
import sys
from pathlib import Path

import torch


class UserError(Exception):
    """Something that the user can mend; the message names the thing and the way out."""


def out_of_memory(error):
    """Whether a device or the system refused memory."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def command(main):
    """Decorates a script's `main(argv)`: a `UserError`, a file that cannot be read or written, or memory that
    is refused becomes one line on stderr and exit status 2; Ctrl-C becomes one line and 130."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.filename is None:  # not about a file: a bug, which deserves its traceback
                raise
            message = f"{error.filename}: {error.strerror}"
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = "not enough memory for this: end other programs, or choose another --device"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130)
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""  # one of many, by torchrun
        print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    return run


class _Heedless:
    """A stream of text that nobody minds when it cannot be written."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


@contextlib.contextmanager
def lines_may_be_lost():
    """Within it a log on a full disk, or a reader that is gone, loses lines and ends nothing."""
    out, err = _Heedless(sys.stdout), _Heedless(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # NaN fails the first test
            limits = f"from {low} to {high}" if high < math.inf else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it in errors
    return parse


FLAGS = {
    "data": dict(
        default="data",
        metavar="DIR",
        help="where CIFAR-10 is: its python archive, or pictures as train/<class>/* and test/<class>/* "
        "(default: data, downloaded when missing)",
    ),
    "dataset": dict(
        default="cifar10",
        choices=["cifar10", "digits"],
        help="digits: the 1,797 handwritten digits of scikit-learn, to try everything with no "
        "download (default: cifar10)",
    ),
    "weights": dict(
        metavar="FILE",
        help="the trained network (default: runs/<dataset>/weights.pt, or for cifar10 without a run the "
        "reference network in weights/)",
    ),
    "image": dict(
        metavar="N|FILE",
        help="picture N of the test set, counted from 0, or a picture file (default: 0)",
    ),
    "map": dict(
        type=number(int, 0),
        metavar="N",
        help="the feature map, counted from 0 (default: the one with the highest mean activation)",
    ),
    "method": dict(
        default="guided",
        choices=["gradient", "guided", "deconvnet"],
        help="how a ReLU passes the signal back (default: guided)",
    ),
    "out": dict(default="figures", metavar="DIR", help="where the figures go (default: figures)"),
    "port": dict(
        type=number(int, 1, 65535), default=8097, metavar="N", help="port of the visdom page (default: 8097)"
    ),
    "device": dict(default="auto", help="cuda, mps or cpu (default: the first that is there)"),
}


def parser(description, *flags):
    """An argument parser with those of `FLAGS`; the script adds what only it has."""
    result = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in flags:
        result.add_argument(f"--{flag}", **FLAGS[flag])
    return result


def folder(path):
    """The folder `path`, made if need be. Raises `UserError`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): name another with --out")
    return path


def device(name):
    """The torch device of that name; "auto" is the first there is of cuda, mps and cpu. Also sets what makes
    it fast. Raises `UserError`."""
    gpus = torch.cuda.is_available() and torch.cuda.device_count()
    there = {"cuda": gpus, "mps": torch.backends.mps.is_available(), "cpu": 1}  # how many
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or (found.index or 0) >= there.get(found.type, 0):
        choices = ", ".join(kind for kind in there if there[kind])
        raise UserError(f"no device {name!r} on this machine: --device takes {choices}")
    if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:  # by torchrun
        return device(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.backends.cudnn.benchmark = True  # the sizes are few: let cuDNN try its algorithms for each
    if found.type == "cpu" and platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()
    return found


def _keep_freed_memory():
    """Makes glibc keep what is freed. By default every large activation is mapped anew from the
    kernel, page by page, at every step: half the time of a training step on a CPU goes there."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is a mapping of its own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not given back
    libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap, so that every thread finds what another freed


@contextlib.contextmanager
def stop_signals(answer="stopping as soon as this step or evaluation is done …"):
    """Within it Ctrl-C, SIGTERM and a closed terminal only add their number to the list that it gives, and
    print the `answer`; one that comes again interrupts at once."""
    arrived = []

    def note(number, frame):
        arrived.append(number)
        signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{answer}\n".encode())

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup does
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_format(device):
    """Channels last, except on Apple GPUs: there the backward pass of batch norm is wrong with it
    (https://github.com/pytorch/pytorch/issues/175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def precision(name, device):
    """The number format for training on `device`: "fp32", "bf16" or "fp16". "auto" is bf16 where
    the hardware computes with it, fp16 on older CUDA devices, else fp32. Raises `UserError`."""
    if name == "fp16" and device.type == "mps":
        raise UserError("--precision fp16 needs a gradient scaler, which mps has not: take fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bf16"
    return "fp32"


def autocast(device, precision):
    """The context in which the network computes with that precision."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
