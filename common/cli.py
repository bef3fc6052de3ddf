"""How every script starts and ends: flags that mean the same everywhere, one line for an error that the user
can fix, and stop signals."""

import argparse
import contextlib
import errno
import functools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """Something that the user can fix; the message names the thing and the way out."""


def out_of_memory(error):
    """Whether a device or the system refused memory."""
    words = "out of memory|(allocate|not enough) memory|ALLOC_FAILED"  # CUDA's and MPS's, the CPU's, cuBLAS's
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def quote(*words):
    """The words as a part of a command line, each to be typed as it is printed."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def one_line(text, limit=290):
    """The text as one line of at most `limit` characters: a longer one loses its middle. What would control a
    terminal becomes "?"."""
    text = "".join("?" if unicodedata.category(c) in ("Cc", "Cs") else c for c in " ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]} … {text[-(limit // 2 - 2) :]}"


FULL = "ENOSPC", "EDQUOT", "EFBIG"  # what the system says when output has no more room
_last_lines = []  # what `command` prints when the script has done its work


def print_last(line):
    """Prints the line after everything else, once, if the script succeeds."""
    if line not in _last_lines:
        _last_lines.append(line)


def command(main):
    """Decorates a script's `main(argv)`: a `UserError`, a file that cannot be read or written, or memory that
    is refused becomes one line on stderr and exit status 2; Ctrl-C becomes one line and status 130; a reader
    of the output that leaves (`| head -1`) becomes status 141. Without `argv` the flags are those of the
    command line if the script was started by it, and none if it was imported, as in a notebook."""

    @functools.wraps(main)
    def run(argv=None):
        prepare_output()
        _last_lines.clear()
        if argv is None:
            argv = sys.argv[1:] if main.__module__ == "__main__" else []
        message, status = None, 2
        try:
            result = main(argv)
            while _last_lines:
                print(_last_lines.pop(0))
            sys.stdout.flush()
            return result
        except UserError as error:
            message = str(error)
        except BrokenPipeError:
            status = 141  # 128 + SIGPIPE, as a shell expects
        except OSError as error:
            if error.filename is None and error.errno == errno.EINVAL and sys.platform == "win32":
                status = 141  # so Windows calls a broken pipe
            elif error.filename is None and errno.errorcode.get(error.errno) not in FULL:
                raise  # a bug, which deserves its traceback
            else:
                message = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = "not enough memory for this: close other programs, or choose another --device"
        except KeyboardInterrupt:
            message, status = "interrupted", 130
        finally:
            drop_unwritten()
        if message:
            rank = f"rank {os.environ['RANK']}: " if by_torchrun() else ""
            with contextlib.suppress(OSError):
                print(one_line(f"{rank}{'error: ' * (status == 2)}{message}"), file=sys.stderr)
        raise SystemExit(status)

    return run


def by_torchrun():
    """Whether this is one of many processes, started by torchrun or as it starts them; if only some of these
    variables are set, they are left over from something else."""
    numbers = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return "MASTER_ADDR" in os.environ and all(map(str.isdecimal, numbers))


def prepare_output():
    """Makes stdout and stderr fit to be printed to, whatever the script was started with: what their encoding
    lacks is printed as "?", and one that is closed, as under pythonw, is the null device."""
    for name in "stdin", "stdout", "stderr":  # descriptors 0, 1 and 2, which no other file may get
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
        elif name != "stdin" and hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="replace")


def drop_unwritten():
    """Drops what is printed but cannot be written: Python would complain of it when it ends."""
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as devnull:
                os.dup2(devnull.fileno(), stream.fileno())


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
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        drop_unwritten()


class _Lines:
    """A file for tqdm where there is no terminal: what it shows becomes lines on stderr."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def progress_bar(*args, **options):
    """A tqdm bar on stderr, which leaves nothing behind; where that is no terminal, one line a minute."""
    if not sys.stderr.isatty():
        options |= dict(file=_Lines(), delay=60, mininterval=60, maxinterval=60)
        options |= dict(bar_format="{desc}: {n_fmt} of {total_fmt}{postfix}")
    return tqdm(*args, leave=False, dynamic_ncols=True, **options)


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
        "train/<class>/* and test/<class>/* (default: data; what needs all of it, or a test image by its "
        "number, downloads it there)"),
    "dataset": dict(default="cifar10", choices=["cifar10", "digits"], help="digits: the 1,797 handwritten "
        "digits of scikit-learn, to try everything with no download (default: cifar10)"),
    "weights": dict(metavar="FILE", help="the trained network: what train.py wrote, any ResNet-18 of "
        "torchvision's, or imagenet (default: runs/<dataset>/weights.pt, or for cifar10 without a run the "
        "network in weights/)"),
    "mean": dict(type=number(float, 0, 1), nargs=3, metavar=("R", "G", "B"), help="the mean of each colour "
        "by which images are normalised, from 0 to 1 (default: what --weights says, or ImageNet's)"),
    "std": dict(type=number(float, 0.001, 1), nargs=3, metavar=("R", "G", "B"), help="the standard "
        "deviation of each colour, likewise"),
    "size": dict(type=number(int, 32, 1024), metavar="PX", help="the side of the images that the "
        "network sees (default: what --weights says, or 224)"),
    "classes": dict(metavar="FILE", help="the names of the classes, one a line (default: what --weights "
        "says, or ImageNet's for 1,000)"),
    "image": dict(metavar="N|FILE", help="image N of the test set, counted from 0, or an image file "
        "(default: 0, or without CIFAR-10 a photograph of a cat)"),
    "class": dict(dest="names", action="append", default=[], metavar="NAME", help="a class to compare with "
        "the predicted one; where several can be drawn, it may be given more than once (default: the second "
        "most probable, or for extras.decision the true class of a test image that the network gets wrong)"),
    "map": dict(default="strongest:1", metavar="N", help="a feature map, counted from 0; several as 7,43; "
        "where it is about one image, also strongest:K by mean activation (default: %(default)s)"),
    "layer": dict(default="conv5_x", choices=["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x"],
        help="stage (default: conv5_x)"),
    "method": dict(default="guided", choices=["gradient", "guided", "deconvnet"], help="how a ReLU passes "
        "the signal back (default: guided)"),
    "out": dict(default="figures", metavar="DIR", help="where the figures go (default: figures)"),
    "port": dict(type=number(int, 1, 65535), default=8097, metavar="N", help="port of the visdom page "
        "(default: 8097)"),
    "device": dict(default="auto", help="cuda, mps or cpu (default: the first available)"),
}  # fmt: skip


NETWORK = "weights", "mean", "std", "size", "classes", "dataset", "device"


def parser(description, *flags, **defaults):
    """An argument parser with these of `FLAGS`, of which "network" stands for those in `NETWORK`, and perhaps
    other `defaults`."""
    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=description, formatter_class=layout, allow_abbrev=False)
    result.error = lambda message: result.exit(
        2, one_line(f"error: {message} (--help lists the flags)") + "\n"
    )
    for name in flags:
        for flag in NETWORK if name == "network" else [name]:
            result.add_argument(f"--{flag}", **FLAGS[flag])
    result.set_defaults(**defaults)
    return result


def port_flag(port):
    """What makes a command find the page on that port: " --port 9000", or nothing for the default one."""
    return "" if port == FLAGS["port"]["default"] else f" --port {port}"


def make_folder(path, way_out="name another with --out"):
    """The folder `path`, made if it is not there yet, to write to. Raises `UserError`, which tells the way
    out."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): {way_out}")
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to the folder {path}: {way_out}")
    return path


@contextlib.contextmanager
def stop_signals(answer="stopping as soon as this step or evaluation is done ..."):
    """Context manager: Ctrl-C, SIGTERM and a closed terminal only add their number to the list that it
    yields, and print the `answer`. The same one again interrupts at once. In another thread than the main one
    there are no signals, and the list stays empty."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

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
