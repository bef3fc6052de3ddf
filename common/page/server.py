"""The visdom server, which imports little else; as a process of its own: server.py PORT PATH"""

import html
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

# visdom imports these two if it finds them, and openTSNE brings scikit-learn and SciPy: the server would
# start seconds later, for what no page here needs. So for a moment they are not to be found.
HIDDEN = [name for name in ("torch", "openTSNE") if name not in sys.modules]
sys.modules.update(dict.fromkeys(HIDDEN))
import visdom  # noqa: E402, F401
from visdom.server import app, run_server  # noqa: E402
from visdom.server.handlers import web_handlers  # noqa: E402
from visdom.utils.server_utils import send_to_sources  # noqa: E402

for name in HIDDEN:
    del sys.modules[name]


def show_front_page():
    """Redirects the bare address and unknown pages to the front page: visdom would show the page seen last,
    which may be gone, or a blank one."""
    get = web_handlers.EnvHandler.get

    def get_page(handler, name):
        if name == "explore" and handler.get_argument("is_open", ""):  # `client.is_explorer_open` asks
            return handler.write(str(is_explorer_open(handler)))
        if name == "explore" and handler.get_argument("image", "").isdecimal():
            return open_in_explorer(handler)
        return get(handler, name) if name in handler.state else handler.redirect("/env/main")

    web_handlers.EnvHandler.get = get_page
    web_handlers.IndexHandler.get = lambda handler, path: handler.redirect("/env/main")


def keep_toolbar_in_one_row():
    """Makes the toolbar of visdom 0.3 fit into 1280 px: its second row would hide a part of the panes."""
    render = web_handlers.EnvHandler.render_string
    style = b"<style>.rc-tree-select {width: 25vw !important}</style>"
    web_handlers.EnvHandler.render_string = lambda *args, **fields: render(*args, **fields) + style


def is_explorer_open(handler):
    """Whether an explorer answers the clicks on its page."""
    return bool(handler.sources) and "Choose" in handler.state.get("explore", {}).get("jsons", {})


def open_in_explorer(handler):
    """Answers the link of a mistake: an explorer that runs is told to open that image, by an event as those
    that the browser sends it; where none runs, the answer is what to type."""
    flags = {key: handler.get_argument(key, "") for key in ("weights", "dataset", "data", "image")}
    flags["port"] = str(handler.application.port)
    defaults = dict(dataset="cifar10", data="data", port="8097")
    changed = {key: value for key, value in flags.items() if value and value != defaults.get(key)}
    given = [word for key, value in changed.items() for word in (f"--{key}", value)]
    quote = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    command = f"<code>{html.escape(quote(['python', 'Myvisdom.py', '--explore', *given]))}</code>"
    if is_explorer_open(handler):
        event = dict(flags, eid="explore", target="Choose", event_type="Open", command=command)
        send_to_sources(handler, event)
        return handler.redirect("/env/explore")
    style = "font:16px sans-serif;line-height:1.7;margin:60px"
    handler.write(f"<title>The explorer</title><div style='{style}'>No explorer is open. In a terminal,<br>"
                  f"{command}<br>opens it on this image; then load this page again.</div>")  # fmt: skip


def rename_damaged(path):
    """Renames what visdom could not read as pages in that folder, such as what a server that was killed saved
    in part."""
    for file in Path(path).glob("*.json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))["jsons"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            file.replace(file.with_suffix(".damaged"))


def serve(port, path):
    """Serves this machine alone until interrupted, with the pages in the folder `path`. Raises OSError."""
    os.makedirs(path, exist_ok=True)
    rename_damaged(path)
    show_front_page()
    keep_toolbar_in_one_row()
    os.environ.setdefault("USERNAME", "you")  # visdom 0.2 asks for a name; some users of containers have none
    logging.disable()  # else the web framework tells on the terminal what it could not answer
    app.tornado_settings["autoreload"] = False  # else an edit to any module would restart it, empty

    def check(actual):  # visdom 0.3 takes another port than one that is busy
        if actual != port:
            raise OSError(f"port {port} is busy")

    run_server.start_server(port, "127.0.0.1", base_url="", env_path=path, bind_local=True, print_func=check)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
