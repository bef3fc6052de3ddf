"""CIFAR-10's python archive: reading it, packed or unpacked, and downloading it."""

import contextlib
import hashlib
import http.client
import lzma
import pickle
import tarfile
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.cli import UserError, progress_bar

PACKED, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"
TIMEOUT = 20  # seconds without data, after which a download has failed


def load(folder, places, splits):
    """[(images uint8 [N, 3, 32, 32], labels int64 [N]) for each split], "train" or "test", from the first of
    these files and folders that has them whole, or downloaded to `folder`. Nothing is unpacked to the disk.
    A packed archive that is only cut off is downloaded again; other damage raises `UserError`."""
    problem = f"no CIFAR-10 in {folder}"
    for place in places:
        try:
            return _read(place, splits)
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].strip(":")
            is_cut = isinstance(error, EOFError) or place.is_file() and not place.stat().st_size
            if place.is_file() and (place == folder or not is_cut):
                way_out = "name another with --data" if place == folder else "delete it to download it again"
                raise UserError(f"{place} is damaged, or not CIFAR-10's python archive ({reason}): {way_out}")
            problem = f"{place} is incomplete ({reason})"
    return _read(_download(folder, problem), splits)


def _read(place, splits):
    """As `load`, from a packed archive or a folder with what it holds. Raises several kinds of errors."""
    from torchvision.datasets import CIFAR10  # it takes a while to import

    files = dict(train=CIFAR10.train_list, test=CIFAR10.test_list)
    names = {name for split in splits for name, _ in files[split]}
    if place.is_dir():
        contents = {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
    else:
        with tarfile.open(place) as tar:  # in its own order: it cannot go back without unpacking again
            members = ((Path(member.name).name, member) for member in tar if member.isfile())
            contents = {name: tar.extractfile(member).read() for name, member in members if name in names}
    result = []
    for split in splits:
        batches = []
        for name, checksum in files[split]:
            if name not in contents:
                raise ValueError(f"{name} is missing")
            if hashlib.md5(contents[name]).hexdigest() != checksum:
                raise ValueError(f"{name} has a wrong checksum")
            batches.append(pickle.loads(contents[name], encoding="latin1"))  # checked, so harmless
        images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
        result.append((images, torch.tensor([label for batch in batches for label in batch["labels"]])))
    return result


def _download(folder, problem):
    """Downloads the archive to `folder`, where it gets its name once it is whole: a download that breaks off
    starts again next time. Returns its path. Raises `UserError`, which begins with `problem`."""
    from torchvision.datasets import CIFAR10

    print(f"{problem}: downloading its python archive, 170 MB, to {folder} …", flush=True)
    # Partial downloads that were killed; a recent one may be of another process that is still downloading.
    for leftover in folder.glob(f"{PACKED}.{'[0-9a-f]' * 32}.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 10 * TIMEOUT:
                leftover.unlink()
    checksum = hashlib.md5()
    with checkpoint.atomic_write(folder / PACKED) as file:
        try:
            for chunk in _receive(CIFAR10.url):
                file.write(chunk)
                checksum.update(chunk)
            if checksum.hexdigest() != CIFAR10.tgz_md5:
                raise ConnectionError("what came is not the archive: is there a login page or a proxy?")
        except ConnectionError as error:
            way_out = f"start again, put {PACKED} or train/<class>/ and test/<class>/ there"
            raise UserError(
                f"{problem}, and its download failed ({error}): {way_out}, or try --dataset digits"
            )
    return folder / PACKED


def _receive(url):
    """Yields what is at that address, in parts, with a progress bar. Raises `ConnectionError`."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            size, done = int(response.headers.get("Content-Length", 0)), 0
            with progress_bar(desc="downloading", total=size, unit="B", unit_scale=True) as bar:
                while chunk := response.read1(2**20):
                    yield chunk
                    done += len(chunk)
                    bar.update(len(chunk))
            if done < size:
                raise ConnectionError(f"the connection ended after {done:,} of {size:,} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConnectionError(error)
