"""The page's JavaScript, style sheets and fonts, which visdom's package lacks.

visdom's server fetches them from the web at its first start; where that fails, or hangs, the page stays
blank. Here they come with a time limit, from the web or else by npm, and a file is there whole or not at
all."""

import contextlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import threading
from pathlib import Path

import requests  # comes with visdom
import visdom

from common.checkpoint import atomic_write
from common.cli import UserError

STATIC = Path(visdom.__file__).parent / "static"
RECORD = "whole.json"  # {"version": visdom's, "sizes": {file: bytes}}
CDN = "https://unpkg.com"

# Each file below STATIC, and where it comes from: npm package@version/path in it. A test holds this against
# what the installed visdom would download.
GLYPHS = "fonts/glyphicons-halflings-regular"
EVERY_VERSION = {
    "js/jquery.min.js": "jquery@3.1.1/dist/jquery.min.js",
    "js/bootstrap.min.js": "bootstrap@3.3.7/dist/js/bootstrap.min.js",
    "js/react-react.min.js": "react@16.2.0/umd/react.production.min.js",
    "js/react-dom.min.js": "react-dom@16.2.0/umd/react-dom.production.min.js",
    "js/react-modal.min.js": "react-modal@3.1.10/dist/react-modal.min.js",
    "js/plotly-plotly.min.js": "plotly.js-dist-min@2.11.1/plotly.min.js",
    "js/sjcl.js": "sjcl@1.0.7/sjcl.js",
    "js/layout_bin_packer.js": "layout-bin-packer@1.4.0/dist/layout-bin-packer.js",
    "js/layout-bin-packer.js.map": "layout-bin-packer@1.4.0/dist/layout-bin-packer.js.map",
    "js/d3.v3.min.js": "d3@3.5.17/d3.min.js",
    "js/d3-selection-multi.v1.js": "d3-selection-multi@1.0.1/build/d3-selection-multi.js",
    "js/saveSvgAsPng.js": "save-svg-as-png@1.4.17/lib/saveSvgAsPng.js",
    "css/bootstrap.min.css": "bootstrap@3.3.7/dist/css/bootstrap.min.css",
    "fonts/classnames": "classnames@2.2.5/index.js",
    f"{GLYPHS}.svg#glyphicons_halflingsregular": f"bootstrap@3.3.7/dist/{GLYPHS}.svg",
} | {f"{GLYPHS}.{kind}": f"bootstrap@3.3.7/dist/{GLYPHS}.{kind}" for kind in ("eot", "ttf", "woff", "woff2")}
MATHJAX_2 = (
    "MathJax.js", "config/Safe.js", "config/TeX-AMS-MML_HTMLorMML.js", "extensions/Safe.js",
    "jax/output/SVG/config.js", "jax/output/SVG/jax.js", "jax/output/SVG/fonts/TeX/fontdata.js",
    "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
)  # fmt: skip
BY_VERSION = {
    "0.2": {
        "css/react-resizable-styles.css": "react-resizable@1.4.6/css/styles.css",
        "css/react-grid-layout-styles.css": "react-grid-layout@0.16.3/css/styles.css",
    }
    | {f"js/mathjax/2.7.5/{path}": f"mathjax@2.7.5/{path}" for path in MATHJAX_2},
    "0.3": {
        "css/react-resizable-styles.css": "react-resizable@3.1.3/css/styles.css",
        "css/react-grid-layout-styles.css": "react-grid-layout@2.2.3/css/styles.css",
        "js/mathjax/3.2.2/es5/tex-mml-svg.js": "mathjax@3.2.2/es5/tex-mml-svg.js",
    },
}


def sources():
    """{file below STATIC: where it comes from} for the installed visdom."""
    return EVERY_VERSION | BY_VERSION["0.2" if visdom.__version__.startswith("0.2.") else "0.3"]


def missing():
    """The part of `sources` that is not there, or not whole, or another visdom's."""
    try:
        record = json.loads((STATIC / RECORD).read_text())
    except (OSError, ValueError):  # perhaps visdom's own server has fetched them
        built = STATIC / "version.built"
        record = dict(version=built.read_text().strip() if built.exists() else None, sizes={})

    def is_whole(file):
        size = (STATIC / file).stat().st_size if (STATIC / file).is_file() else 0
        return size and size == record["sizes"].get(file, size)

    known = record["version"] == visdom.__version__
    return {file: source for file, source in sources().items() if not (known and is_whole(file))}


def from_web(files):
    """{file: content} of {file: source}. Raises an OSError, which those of requests are."""
    contents = {}
    with requests.Session() as session:
        for file, source in files.items():
            answer = session.get(f"{CDN}/{source}", timeout=5)
            answer.raise_for_status()
            contents[file] = answer.content
    return contents


def from_npm(files):
    """{file: content} of {file: source}. Raises an OSError, or one of subprocess, tarfile or a lookup."""
    contents, packages = {}, sorted({source.partition("/")[0] for source in files.values()})
    command = [shutil.which("npm") or "npm", "pack", "--json", "--fetch-retries=0", *packages]
    with tempfile.TemporaryDirectory() as folder:
        options = dict(stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
        packed = json.loads(subprocess.run(command, cwd=folder, **options).stdout)
        for package, name in zip(packages, (each["filename"] for each in packed)):
            with tarfile.open(Path(folder, name)) as archive:
                for file, source in files.items():
                    if source.startswith(f"{package}/"):
                        contents[file] = archive.extractfile(source.replace(package, "package", 1)).read()
    return contents


def within(seconds, fetch, files):
    """What `fetch` returns, or None if it fails or takes longer: then its thread is left to end with the
    process. The time limits of sockets do not help where an answer drips."""
    results = []

    def run():
        with contextlib.suppress(
            OSError, subprocess.SubprocessError, tarfile.TarError, ValueError, LookupError
        ):
            results.append(fetch(files))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def ensure():
    """Fetches what is missing, in at most a minute and a half. Raises `UserError` if it cannot be had."""
    if not (files := missing()):
        return
    print("fetching the files of visdom's page, once …", flush=True)
    contents = within(30, from_web, files) or within(60, from_npm, files)
    if not contents:
        raise UserError(
            f"visdom's page will be blank: neither the web nor npm has the {len(files)} files that it needs "
            f"({min(files)}, …): connect once, or install npm"
        )
    for file, content in contents.items():
        _write(file, content)
    sizes = {file: (STATIC / file).stat().st_size for file in sources()}
    _write("version.built", visdom.__version__.encode())
    _write(RECORD, json.dumps(dict(version=visdom.__version__, sizes=sizes)).encode())


def _write(file, content):
    try:
        (STATIC / file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"visdom's page will be blank: {error.filename} cannot be made ({error.strerror})")
    with atomic_write(STATIC / file) as opened:
        opened.write(content)
