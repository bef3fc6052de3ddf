"""How every script starts and ends: flags that mean the same everywhere, one line for an error that the user
can fix, and stop signals."""

import argparse
import contextlib
import functools
import math
import os
import re
import signal
import sys
from pathlib import Path


class UserError(Exception):
    """Something that the user can fix; the message names the thing and the way out."""


def out_of_memory(error):
    """Whether a device or the system refused memory."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def command(main):
    """Decorates a script's `main(argv)`: a `UserError`, a file that cannot be read or written, or memory that
    is refused becomes one line on stderr and exit status 2; Ctrl-C becomes one line and status 130."""

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


class _TolerantStream:
    """A text stream whose write errors are ignored."""

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
def ignore_output_errors():
    """Context manager: output that cannot be written (a full disk, a closed pipe) is dropped."""
    out, err = _TolerantStream(sys.stdout), _TolerantStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


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
    "data": dict(default="data", metavar="DIR", help="where CIFAR-10 is: its python archive, or images as "
        "train/<class>/* and test/<class>/* (default: data, downloaded when missing)"),
    "dataset": dict(default="cifar10", choices=["cifar10", "digits"], help="digits: the 1,797 handwritten "
        "digits of scikit-learn, to try everything with no download (default: cifar10)"),
    "weights": dict(metavar="FILE", help="the trained network (default: runs/<dataset>/weights.pt, or for "
        "cifar10 without a run the reference network in weights/)"),
    "image": dict(metavar="N|FILE", help="image N of the test set, counted from 0, or an image file "
        "(default: 0)"),
    "map": dict(default="strongest:1", metavar="N", help="a feature map, counted from 0; several as 7,43; "
        "for an image also strongest:K, by mean activation (default: %(default)s)"),
    "method": dict(default="guided", choices=["gradient", "guided", "deconvnet"], help="how a ReLU passes "
        "the signal back (default: guided)"),
    "out": dict(default="figures", metavar="DIR", help="where the figures go (default: figures)"),
    "port": dict(type=number(int, 1, 65535), default=8097, metavar="N", help="port of the visdom page "
        "(default: 8097)"),
    "device": dict(default="auto", help="cuda, mps or cpu (default: the first available)"),
}  # fmt: skip


def parser(description, *flags, **defaults):
    """An argument parser with those of `FLAGS`, some perhaps with other `defaults`."""
    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=description, formatter_class=layout)
    result.error = lambda message: result.exit(2, f"error: {message} (--help lists the flags)\n")
    for flag in flags:
        result.add_argument(f"--{flag}", **FLAGS[flag])
    result.set_defaults(**defaults)
    return result


def make_folder(path):
    """The folder `path`, made if it is not there yet. Raises `UserError`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): name another with --out")
    return path


@contextlib.contextmanager
def stop_signals(answer="stopping as soon as this step or evaluation is done …"):
    """Context manager: Ctrl-C, SIGTERM and a closed terminal only add their number to the list that it
    yields, and print the `answer`. The same one again interrupts at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{answer}\n".encode())

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
