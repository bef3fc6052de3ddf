"""Saving and loading: whole files or none, and never a pickle that could run something."""

import contextlib
import csv
import io
import os
import re
import uuid
import warnings
import zipfile
from pathlib import Path

import torch

from common.cli import UserError


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write, in a folder that is made if need be: at every instant `path` is the whole old
    file or the whole new one. Raises `UserError` if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path} ({reason}): make room there, or choose another folder")
    finally:
        with contextlib.suppress(OSError):  # it has been moved, or the disk has become read-only
            temporary.unlink()


def save_table(rows, path):
    """Writes `rows` of cells as CSV by `atomic_write`; returns the path."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
    return path


def save(content, path):
    """Writes `content` (tensors, numbers, text, in lists and dictionaries) by `atomic_write`."""
    with atomic_write(path) as file:
        whole = io.BytesIO()  # if torch.save wrote to the file, a full disk would be one of its RuntimeErrors
        torch.save(content, whole)
        file.write(whole.getbuffer())


def cached(path, compute):
    """What `compute()` gave when the file `path` was saved, or else computed and saved there now. A save that
    fails is reported, not raised."""
    with contextlib.suppress(UserError):  # there is none, or it is damaged
        return load(path)
    content = compute()
    try:
        save(content, path)
    except UserError as error:
        print(f"could not cache this, so the next run computes it again: {error}")
    return content


def load(path):
    """What `save` wrote, or another state dict, on the CPU. Raises `UserError` if there is none, or it is
    something else, or damaged, or holds pickled objects."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch does not look at the checksums
                    raise zipfile.BadZipFile
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there are a dozen kinds, by what the file turns out to be
        if isinstance(error, MemoryError) or getattr(error, "filename", None):  # it cannot be read at all
            raise
        with open(path, "rb") as file:
            pickled = re.match(rb"\x80[\x03-\x05]", file.read(2))  # not torch.save's protocol, 2
        if pickled or re.search("GLOBAL|TorchScript|Can only (create|build)|call reduce", str(error)):
            objects = "holds pickled objects, which are not loaded since they can run code"
            raise UserError(f"{path} {objects}: save a state dict instead, torch.save(model.state_dict(), …)")
        raise UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})")
