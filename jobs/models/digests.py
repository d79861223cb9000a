"""The sha256 of files, remembered by what the file system says of them: gigabytes are hashed once per node."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latentmill.jobs.models.node import cache_folder, node_name, one_at_a_time

_SETTLED_NANOSECONDS = 2_000_000_000
"""A file younger than this is hashed and not remembered: one more change might leave its times as they are."""

_THREADS = 4

Identity = tuple[int, int, int, int, int]
"""Size, time of change of the content and of the entry, number and device: `touch -r` cannot bring all of it back."""


def file_digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of each file, by the same names."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(file_digest, paths.values()), strict=True))


def file_digest(path: Path) -> str:
    """The file's sha256: remembered if nothing has touched the file since, else every byte is read.

    However many processes ask at once, one of them reads. Raises OSError for a file that cannot be read.
    """
    path = path.resolve()
    known = _recall(path)
    if known is not None:
        return known
    with one_at_a_time(_key(path)):
        known = _recall(path)
        return known if known is not None else _read(path)


def remember_digest(path: Path, identity: Identity, digest: str) -> None:
    """For a file that this process has just written, and nobody else."""
    path = path.resolve()
    write_note(_note(path), {"path": str(path), "identity": identity, "sha256": digest})


def identity_of(status: os.stat_result) -> Identity:
    """What changes if the file does."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def read_note(path: Path) -> dict[str, object]:
    """A note of this cache; empty if there is none, or if a crash left half of it."""
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(path: Path, note: Mapping[str, object]) -> None:
    """Afterwards the note stands whole, or as it was: a cache that cannot be written is no error, only slow."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(note), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NANOSECONDS
    if settled and identity_of(before) == identity_of(after):
        remember_digest(path, identity_of(after), digest)
    return digest


def _recall(path: Path) -> str | None:
    note = read_note(_note(path))
    if note.get("path") != str(path) or note.get("identity") != list(identity_of(path.stat())):
        return None
    return str(note["sha256"])


def _key(path: Path) -> str:
    # a home folder may be shared by nodes on whose own disks the same path is another file
    return hashlib.sha256(f"{node_name()}\n{path}".encode()).hexdigest()[:40]


def _note(path: Path) -> Path:
    return cache_folder() / "digests" / f"{_key(path)}.json"
