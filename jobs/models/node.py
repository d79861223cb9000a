"""What one node keeps for all its processes: a cache folder, and locks in it that the kernel lets go of.

Nobody's correctness depends on a lock here: it only keeps eight processes from doing the same work at once.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 1800.0
"""How long another process may be at it before one goes ahead beside it: it may be stopped, and hold its lock."""

_NOWHERE = Path("/dev/null/latentmill")
"""Cannot be written: nothing is remembered, and a model at a URL asks for LATENTMILL_CACHE."""


def cache_folder() -> Path:
    """Where this node keeps models and what it knows of them: LATENTMILL_CACHE, else ~/.cache/latentmill."""
    named = os.environ.get("LATENTMILL_CACHE")
    try:
        return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "latentmill"
    except RuntimeError:  # a user without a home, as containers have
        return _NOWHERE


def node_name() -> str:
    """What errors call the machine that this process is on."""
    return socket.gethostname()


@contextmanager
def one_at_a_time(key: str, *, patience: float = PATIENCE_SECONDS) -> Iterator[bool]:
    """Within, this process is the only one of the node with this key: True. Or there is no knowing: False.

    The second happens where the cache cannot be written, knows no locks, or the lock's holder outlasts `patience`.
    """
    try:
        folder = cache_folder() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / key).open("a")
    except OSError:
        yield False
        return
    with file:
        yield _lock(file.fileno(), patience)


def _lock(handle: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:
            return False
        else:
            return True
