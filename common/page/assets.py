"""The page's JavaScript, style sheets and fonts. visdom fetches them from the web at its first start; where
that fails, or hangs, the page stays blank. Here they come with a time limit, from the web or else by npm, and
each is there whole or not at all."""

import contextlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import requests  # comes with visdom

from common.checkpoint import atomic_write
from common.cli import UserError
from common.page.server import visdom

STATIC = Path(visdom.__file__).parent / "static"
RECORD = "whole.json"  # {"version": visdom's, "sizes": {file: bytes}}
CDN = "https://unpkg.com"
VISDOM_0_2 = visdom.__version__.startswith("0.2.")
MATHJAX_2 = (
    "MathJax.js", "config/Safe.js", "config/TeX-AMS-MML_HTMLorMML.js", "extensions/Safe.js",
    "jax/output/SVG/config.js", "jax/output/SVG/jax.js", "jax/output/SVG/fonts/TeX/fontdata.js",
    "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
)  # fmt: skip


def sources():
    """{file below STATIC: npm package@version/path in it}: those that the installed visdom would download."""
    files = {
        "js/jquery.min.js": "jquery@3.1.1/dist/jquery.min.js",
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
        "fonts/classnames": "classnames@2.2.5/index.js",
    }
    kinds = "eot", "ttf", "woff", "woff2", "svg#glyphicons_halflingsregular"
    fonts = [f"fonts/glyphicons-halflings-regular.{kind}" for kind in kinds]
    for file in "js/bootstrap.min.js", "css/bootstrap.min.css", *fonts:
        files[file] = f"bootstrap@3.3.7/dist/{file.partition('#')[0]}"
    resizable, grid_layout = ("1.4.6", "0.16.3") if VISDOM_0_2 else ("3.1.3", "2.2.3")
    files["css/react-resizable-styles.css"] = f"react-resizable@{resizable}/css/styles.css"
    files["css/react-grid-layout-styles.css"] = f"react-grid-layout@{grid_layout}/css/styles.css"
    mathjax, scripts = ("2.7.5", MATHJAX_2) if VISDOM_0_2 else ("3.2.2", ["es5/tex-mml-svg.js"])
    return files | {f"js/mathjax/{mathjax}/{path}": f"mathjax@{mathjax}/{path}" for path in scripts}


def missing():
    """The part of `sources` that is not there, not whole, or another visdom's."""
    try:
        record = json.loads((STATIC / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # perhaps visdom's own server has fetched them
        built = STATIC / "version.built"
        record = dict(version=built.read_text(encoding="utf-8").strip() if built.exists() else None, sizes={})
    if record["version"] != visdom.__version__:
        return sources()
    sizes = {file: (STATIC / file).stat().st_size for file in sources() if (STATIC / file).is_file()}
    whole = {file for file, size in sizes.items() if size and size == record["sizes"].get(file, size)}
    return {file: source for file, source in sources().items() if file not in whole}


def from_web(files):
    """{file: content} of {file: source}."""
    contents = {}
    with requests.Session() as session:
        for file, source in files.items():
            answer = session.get(f"{CDN}/{source}", timeout=5)
            answer.raise_for_status()
            contents[file] = answer.content
    return contents


def from_npm(files):
    """{file: content} of {file: source}."""
    contents, packages = {}, sorted({source.partition("/")[0] for source in files.values()})
    command = [shutil.which("npm") or "npm", "pack", "--json", "--fetch-retries=0", *packages]
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, timeout=60)
        for package, archive in zip(packages, json.loads(output)):
            with tarfile.open(Path(folder, archive["filename"])) as tar:
                for file, source in files.items():
                    if source.startswith(f"{package}/"):
                        contents[file] = tar.extractfile(source.replace(package, "package", 1)).read()
    return contents


def within(seconds, fetch, files):
    """What `fetch(files)` returns, or None if it fails or takes longer, as where an answer drips."""
    with contextlib.suppress(Exception), ThreadPool(1) as pool:  # no web, no npm, a broken archive, …
        return pool.apply_async(fetch, [files]).get(seconds)


def ensure():
    """Fetches all files if any is missing, in 90 seconds. Raises `UserError` if they cannot be had."""
    if not missing():
        return
    print("fetching the files of visdom's page, once …", flush=True)
    contents = within(30, from_web, sources()) or within(60, from_npm, sources())
    if not contents:
        reason = "neither the web nor npm has the files that it needs"
        raise UserError(f"visdom's page will be blank: {reason}: connect once, or install npm")
    sizes = {file: len(content) for file, content in contents.items()}
    contents["version.built"] = visdom.__version__.encode()
    contents[RECORD] = json.dumps(dict(version=visdom.__version__, sizes=sizes)).encode()
    for file, content in contents.items():
        with atomic_write(STATIC / file) as opened:
            opened.write(content)
