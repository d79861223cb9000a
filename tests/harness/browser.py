"""A real Chromium for tests of pages: where it is on this machine, or what to install. `python -m` says which."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowserError(RuntimeError):
    """No Chromium, or nothing that drives one."""


def find_chromium() -> Path:
    """The browser's program: that of the variable CHROMIUM, else the first that is on the path."""
    if find_spec("playwright") is None:
        raise NoBrowserError("the Python package playwright is not installed: make dev")
    named = os.environ.get("CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise NoBrowserError(
            f"CHROMIUM={named} is no program"
            if named
            else f"no Chromium on this machine (looked for {', '.join(_NAMES)}); on Debian and Ubuntu: "
            f"apt-get install chromium; elsewhere name its program in the variable CHROMIUM"
        )
    return Path(found)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of files, as a bucket's public address is: no page of its own, no scripts, no cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    try:
        print(find_chromium())
    except NoBrowserError as error:
        sys.exit(f"tests of pages need a browser: {error}")
