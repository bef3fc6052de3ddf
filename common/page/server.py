"""The visdom server, in a process of its own that imports little else: server.py PORT PATH"""

import logging
import os
import sys

from visdom.server import app, run_server


def serve(port, path):
    """Serves this machine alone until interrupted, with the pages in the folder `path`. Raises OSError."""
    os.makedirs(path, exist_ok=True)
    logging.disable()  # what a browser asks for and does not get, the web framework would tell on the terminal
    app.tornado_settings["autoreload"] = False  # else an edit to any module would restart it, empty

    def check(actual):  # visdom 0.3 takes another port than one that is busy
        if actual != port:
            raise OSError(f"port {port} is busy")

    run_server.start_server(port, "127.0.0.1", base_url="", env_path=path, bind_local=True, print_func=check)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
