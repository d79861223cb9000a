"""The sha256 of files, cached by their status in the file system: gigabytes are hashed once per node."""

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
"""The hash of a younger file is not cached: another change may leave its times unchanged."""

_THREADS = 4

Identity = tuple[int, int, int, int, int]
"""Size, time of change of the content and of the entry, number and device: `touch -r` cannot restore all of them."""


def file_digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of each file, by the same names."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(file_digest, paths.values()), strict=True))


def file_digest(path: Path) -> str:
    """The file's sha256: from the cache if the file is untouched since, else from its bytes.

    Only one process of a node reads a file at a time. Raises OSError if it cannot be read.
    """
    path = path.resolve()
    known = _recall(path)
    if known is not None:
        return known
    with one_at_a_time(_key(path)):
        known = _recall(path)
        return known if known is not None else _read(path)


def remember_digest(path: Path, identity: Identity, digest: str) -> None:
    """Cache the hash of a file that this process has just written."""
    path = path.resolve()
    write_note(_note(path), {"path": str(path), "identity": identity, "sha256": digest})


def identity_of(status: os.stat_result) -> Identity:
    """A value that changes with the file."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def read_note(path: Path) -> dict[str, object]:
    """A note of this cache; empty if it is missing or damaged."""
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(path: Path, note: Mapping[str, object]) -> None:
    """Afterwards the note is written or unchanged: a cache that cannot be written is slow, but not an error."""
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
    # nodes may share a home folder, and yet have different files at the same path
    return hashlib.sha256(f"{node_name()}\n{path}".encode()).hexdigest()[:40]


def _note(path: Path) -> Path:
    return cache_folder() / "digests" / f"{_key(path)}.json"
