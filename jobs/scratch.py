"""Private short-lived folders on this machine, and the removal of those whose owner was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CLUSTER_PREFIX, PLAN_PREFIX = "lm-", "latentmill-plan-"

_LOCK = "owner.lock"
_YOUNG_SECONDS = 60.0


@contextlib.contextmanager
def scratch_folder(base: Path, prefix: str) -> Iterator[Path]:
    """A folder for this process alone, gone afterwards. A killed owner's folder is removed by a later call.

    The owner holds a lock in it, which the kernel lets go when the owner dies, however it dies.
    """
    _remove_left(base, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def short_base() -> Path:
    """Ray puts sockets far below, and a socket's path may have 107 bytes."""
    base = Path(tempfile.gettempdir())
    return base if len(str(base)) <= 12 else Path("/tmp")  # noqa: S108 - mkdtemp makes a private folder in it


def _remove_left(base: Path, prefix: str) -> None:
    for folder in base.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another user's, or just being removed by someone else
            about = folder.stat()
            if about.st_uid != os.getuid() or time.time() - about.st_mtime < _YOUNG_SECONDS:
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
