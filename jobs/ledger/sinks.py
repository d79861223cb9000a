"""Where the pictures of an attempt go. A sink writes under the attempt's own names, so attempts never meet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from latentmill.jobs.errors import UsageError
from latentmill.jobs.store.storage import Storage

_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """One picture as it lies in storage: `path` is relative to the output."""

    path: str
    size: int
    sha256: str


class Sink(Protocol):
    """Writes the pictures of one attempt, and finds them again by the paths in the commit record."""

    def write(
        self, chunk: int, attempt: str, images: Sequence[tuple[str, bytes]], repair: int = 0
    ) -> dict[str, StoredImage]:
        """Store `(sample_id, file bytes)` pairs; afterwards all of them are durable.

        `repair` is the number of the repair that the attempt is one at, 0 if it is one at the chunk itself.
        """

    def read(self, path: str) -> bytes:
        """The file bytes of one picture. Raises FileNotFoundError if it is gone."""

    def sizes(self, chunk: int, attempt: str, repair: int = 0) -> Mapping[str, int]:
        """Size by path of everything that lies under one attempt, with as few requests as the store allows."""


class FilesSink:
    """One PNG per sample: `images/00000/00000007-{attempt}/{sample_id}.png`, of a repair `00000007-r1-{attempt}`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def write(
        self, chunk: int, attempt: str, images: Sequence[tuple[str, bytes]], repair: int = 0
    ) -> dict[str, StoredImage]:
        """Store the pictures, several at a time."""
        folder = attempt_folder(chunk, attempt, repair)

        def store(item: tuple[str, bytes]) -> tuple[str, StoredImage]:
            sample_id, data = item
            path = f"{folder}/{sample_id}.png"
            self._storage.write(path, data)
            return sample_id, StoredImage(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(pool.map(store, images))

    def read(self, path: str) -> bytes:
        """The PNG."""
        return self._storage.read(path)

    def sizes(self, chunk: int, attempt: str, repair: int = 0) -> Mapping[str, int]:
        """One listing of the attempt's folder."""
        return dict(self._storage.list(attempt_folder(chunk, attempt, repair)))


def attempt_folder(chunk: int, attempt: str, repair: int = 0) -> str:
    """The folder that belongs to one attempt at one chunk, or at one repair of it, alone."""
    number = f"r{repair}-" if repair else ""
    return f"images/{chunk // 1000:05d}/{chunk:08d}-{number}{attempt}"


SINKS: Mapping[str, type[FilesSink]] = {"files": FilesSink}
"""What `--format` can name."""


def open_sink(name: str, storage: Storage) -> Sink:
    """The sink that `--format` names."""
    if name not in SINKS:
        raise UsageError(f"format is {name!r}; there are {', '.join(SINKS)}")
    return SINKS[name](storage)
