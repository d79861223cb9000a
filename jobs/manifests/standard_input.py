"""A manifest from standard input, copied to a temporary file because a plan reads its rows more than once."""

from __future__ import annotations

import atexit
import gzip
import shutil
import sys
import tempfile
import zlib
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.formats import LOOK_BYTES, SUFFIXES, suffix_like
from latentmill.jobs.scratch import PLAN_PREFIX, scratch_folder

NAMES = frozenset({"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"})
SHOWN_AS = "standard input"

_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20


@cache
def spooled_input() -> Path:
    """The file that holds all of standard input, with the suffix of the format it looks like; removed at exit.

    Raises UsageError if there is nothing to read.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError("standard input is a terminal; pipe a manifest into it: cat prompts.txt | ... -")
    kept = ExitStack()
    folder = kept.enter_context(scratch_folder(Path(tempfile.gettempdir()), PLAN_PREFIX))
    atexit.register(kept.close)
    path = folder / "standard-input"
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _BLOCK)
    except OSError as error:
        raise UsageError(
            f"standard input cannot be copied to {folder}: {error.strerror or error}; set TMPDIR to a folder with "
            f"more space, or name a file"
        ) from None
    return path.rename(path.with_name(f"{path.name}.{_suffix(path)}"))


def _suffix(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(LOOK_BYTES)
    if not start.startswith(_GZIP):
        return suffix_like(start)
    try:
        with gzip.open(path) as file:
            return f"{suffix_like(file.read(LOOK_BYTES))}.gz"
    except (OSError, EOFError, zlib.error):
        return f"{SUFFIXES[0]}.gz"  # its reader says what is wrong with it
