"""A manifest from standard input: copied to a file of this process's own, for a plan reads its rows more than once."""

from __future__ import annotations

import atexit
import csv
import gzip
import shutil
import sys
import tempfile
import zlib
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from latentmill.jobs.errors import UsageError
from latentmill.jobs.scratch import PLAN_PREFIX, scratch_folder

NAMES = frozenset({"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"})
SHOWN_AS = "standard input"

_LOOK_BYTES = 1 << 16
_GZIP, _PARQUET, _PNG = b"\x1f\x8b", b"PAR1", b"\x89PNG"
_BLOCK = 1 << 20


@cache
def spooled_input() -> Path:
    """The file that holds all of standard input, named after what it looks like; it is gone when this process is.

    Raises UsageError if there is nothing to read.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError("standard input is a terminal, and no manifest; pipe one into it: cat prompts.txt | ... -")
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
        start = file.read(_LOOK_BYTES)
    if not start.startswith(_GZIP):
        return _kind(start)
    try:
        with gzip.open(path) as file:
            return f"{_kind(file.read(_LOOK_BYTES))}.gz"
    except (OSError, EOFError, zlib.error):
        return "txt.gz"  # whoever reads it says what is wrong with it


def _kind(start: bytes) -> str:
    """What the first bytes look like: a file without a name says only by its content what it is."""
    if start.startswith(_PARQUET):
        return "parquet"
    if start.startswith(_PNG):
        return "png"
    text = start.decode("utf-8-sig", "replace").lstrip()
    if text.startswith(("{", "[")):
        return "jsonl" if text.startswith("{") else "json"
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        cells = next(csv.reader([text.partition("\n")[0]], delimiter=delimiter), [])
        if "prompt" in {cell.strip() for cell in cells}:
            return suffix
    return "txt"
