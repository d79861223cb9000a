"""A cache folder shared by the processes of one node, with locks in it that the kernel releases.

The locks are not needed for correctness: they keep processes from doing the same work at the same time.
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
"""Seconds to wait for another process, which may be stopped while it holds the lock."""

_NOWHERE = Path("/dev/null/latentmill")
"""Never writable: nothing is cached, and a model at a URL needs LATENTMILL_CACHE."""


def cache_folder() -> Path:
    """The folder of cached models and hashes on this node: LATENTMILL_CACHE, else ~/.cache/latentmill."""
    named = os.environ.get("LATENTMILL_CACHE")
    try:
        return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "latentmill"
    except RuntimeError:  # a user without a home folder, as in some containers
        return _NOWHERE


def node_name() -> str:
    """The name of this machine in error messages."""
    return socket.gethostname()


@contextmanager
def one_at_a_time(key: str, *, patience: float = PATIENCE_SECONDS) -> Iterator[bool]:
    """Hold the node's lock for this key: True if held, False if the work is to go on without it.

    False means that the cache is not writable, supports no locks, or that the wait exceeded `patience`.
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
