"""The scripts, style sheets and fonts of visdom's page, which its package lacks.

visdom's server fetches them from the web at its first start; where that fails, or hangs, the page stays
blank. Here they come with a time limit, from the web as visdom would have them or else out of the same
packages by npm, and a file is there whole or not at all."""

import contextlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import requests
import visdom
from visdom.server import build

from common.checkpoint import replacing
from common.cli import UserError

STATIC = Path(visdom.__file__).parent / "static"
RECORD = "whole.json"  # {"version": visdom's, "sizes": {path: bytes}}
IN_A_PACKAGE = (  # where an address of the web is found: package@version, path in it
    (r"/plotly-([\d.]+)\.min\.js$", r"plotly.js-dist-min@\1", r"plotly.min.js"),
    (r"/d3\.v(\d+)\.min\.js$", r"d3@\1", r"d3.min.js"),
    (r"/(d3-[\w-]+)\.v(\d+)\.js$", r"\1@\2", r"build/\1.js"),
    (r"/mathjax/([\d.]+)/(.+)$", r"mathjax@\1", r"\2"),
    (r"/([\w.-]+@[\d.]+)$", r"\1", r"index.js"),
    (r"/([\w.-]+@[\d.]+)/(.+)$", r"\1", r"\2"),
)


def wanted():
    """{path below STATIC: address in the web}: what the installed visdom would download."""

    def opened(what):  # an address, or a request for one: what is "downloaded" is the address itself
        address = getattr(what, "full_url", what).encode()
        return SimpleNamespace(read=lambda: address, content=address)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(urllib.request, "build_opener", lambda *handlers: SimpleNamespace(open=opened)),
        mock.patch.object(urllib.request, "install_opener"),
        mock.patch.object(requests, "get", opened),
        mock.patch.object(build, "print", create=True),
    ):
        build.download_scripts(install_dir=folder)
        static = Path(folder, "static")
        files = [path for path in static.rglob("*") if path.is_file() and path.name != "version.built"]
        return {path.relative_to(static).as_posix(): path.read_text() for path in files}


def missing():
    """The part of `wanted` that is not there, or not whole, or another visdom's."""
    try:
        record = json.loads((STATIC / RECORD).read_text())
        version, sizes = record["version"], record["sizes"]
    except (OSError, ValueError, KeyError):
        built, sizes = STATIC / "version.built", {}
        version = built.read_text().strip() if built.exists() else None

    def whole(path):
        size = (STATIC / path).stat().st_size if (STATIC / path).is_file() else 0
        return size and size == sizes.get(path, size)

    files = wanted()
    if version != visdom.__version__:
        return files
    return {path: address for path, address in files.items() if not whole(path)}


def from_the_web(files):
    """{path: content}, or an OSError, which those of requests are."""
    contents = {}
    with requests.Session() as session:
        for path, address in files.items():
            answer = session.get(address, timeout=5)
            answer.raise_for_status()
            contents[path] = answer.content
    return contents


def in_a_package(address):
    """(package@version, path in it) of an address of the web."""
    address = re.sub(r"[?#].*", "", address)
    for pattern, package, path in IN_A_PACKAGE:
        if match := re.search(pattern, address):
            return match.expand(package), match.expand(path)
    raise LookupError(address)


def from_npm(files):
    """{path: content}, or an OSError or an error of subprocess, tarfile or looking a key up."""
    places = {path: in_a_package(address) for path, address in files.items()}
    packages = sorted({package for package, _ in places.values()})
    npm = shutil.which("npm") or "npm"
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--json", "--fetch-retries=0", *packages]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True
        )
        archives = {}
        for package, packed in zip(packages, json.loads(done.stdout)):
            archives[package] = tarfile.open(Path(folder, packed["filename"]))
        contents = {}
        for path, (package, member) in places.items():
            with archives[package].extractfile(f"package/{member}") as file:
                contents[path] = file.read()
        for archive in archives.values():
            archive.close()
    return contents


def within(seconds, work, *args):
    """What `work` returns or raises, or a TimeoutError: then it is left to a thread that ends with the
    process. The time limits of sockets do not help where an answer drips."""
    future = Future()

    def run():
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def ensure():
    """Fetches what is missing, in at most a minute and a half. Raises `UserError` if it cannot be had."""
    if not (files := missing()):
        return
    print("fetching the files of visdom's page, once …", flush=True)
    for fetch, seconds in ((from_the_web, 30), (from_npm, 60)):
        with contextlib.suppress(
            OSError, subprocess.SubprocessError, tarfile.TarError, ValueError, LookupError
        ):  # those of requests are OSErrors
            contents = within(seconds, fetch, files)
            break
    else:
        raise UserError(
            f"visdom's page will be blank: neither the web nor npm has the {len(files)} files that it needs "
            f"({min(files)}, …): connect once, or install npm"
        )
    for path, content in contents.items():
        write(path, content)
    sizes = {path: (STATIC / path).stat().st_size for path in wanted()}
    write("version.built", visdom.__version__.encode())
    write(RECORD, json.dumps(dict(version=visdom.__version__, sizes=sizes)).encode())


def write(path, content):
    try:
        (STATIC / path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"visdom's page will be blank: {error.filename} cannot be made ({error.strerror})")
    with replacing(STATIC / path) as file:
        file.write(content)
