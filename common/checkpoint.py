"""Saving and loading: whole files or none, and never a pickle that could run something."""

import contextlib
import os
from pathlib import Path

import torch

from common.cli import UserError


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write, in a folder that is made if need be: at every instant `path` is the whole old
    file or the whole new one. Raises `UserError` if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path} ({reason}): make room there, or choose another folder")
    finally:
        with contextlib.suppress(OSError):  # it has been moved, or the disk has become read-only
            temporary.unlink()


def save(content, path):
    """Writes `content` (tensors, numbers, text, in lists and dictionaries) by `atomic_write`."""
    with atomic_write(path) as file:
        torch.save(content, file)


def cached(path, fingerprint, compute):
    """What `compute()`, a dictionary, gave for this `fingerprint`: from the file `path`, or else computed and
    saved there. A save that fails is reported, not raised."""
    try:
        content = load(path)
        if content["fingerprint"] == fingerprint:
            return content
    except (UserError, KeyError, TypeError):  # none there, or not one of ours
        pass
    content = compute() | dict(fingerprint=fingerprint)
    try:
        save(content, path)
    except UserError as error:
        print(f"could not cache this, so the next run computes it again: {error}")
    return content


def load(path):
    """What `save` wrote, on the CPU. Raises `UserError` if there is none or it is something else."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen kinds, by what the file turns out to be
        raise UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})")
