"""Where the pictures of an attempt lie: under the attempt's own names, so attempts never meet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from latentmill.jobs.ledger.ledger import PER_FOLDER
from latentmill.jobs.store.errors import FOREIGN_REMEDY, ForeignObjectError, StorageError
from latentmill.jobs.store.storage import Storage

MAX_PICTURE_BYTES = 64 << 20
"""The largest picture file: more than 4096 x 4096 pixels and their text take unpacked."""

_THREADS = 8
_PICTURE = re.compile(r"images/\d{5,}/(\d{8,})-(?:r[1-9]\d*-)?[0-9a-f]{16}/\d{8,}\.png", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """One picture as it lies in storage: `path` is relative to the output."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Origin:
    """A picture's file in another output."""

    storage: Storage
    path: str


class LostPictureError(StorageError):
    """A row's picture that is missing, or is not the file that was committed. Says which, to follow the file's name."""


class PictureStore:
    """One PNG per sample: `images/00000/00000007-{attempt}/{sample_id}.png`, of a repair `00000007-r1-{attempt}`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def write(
        self,
        chunk: int,
        attempt: str,
        images: Sequence[tuple[str, bytes]],
        repair: int = 0,
        origins: Mapping[str, Origin] = MappingProxyType({}),
    ) -> dict[str, StoredImage]:
        """Store `(sample_id, file bytes)` pairs, several at a time; afterwards all of them are durable.

        `repair` is the number of the repair that the attempt is one at, 0 if it is one at the chunk itself. Those in
        `origins` become hard links where their file can have one more.
        """

        def store(item: tuple[str, bytes]) -> tuple[str, StoredImage]:
            sample_id, data = item
            path = picture_path(chunk, attempt, sample_id, repair)
            origin = origins.get(sample_id)
            if origin is None or not self._storage.link(path, data, origin.storage, origin.path):
                self._storage.write(path, data)
            return sample_id, StoredImage(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(pool.map(store, images))

    def read(self, path: str, limit: int = MAX_PICTURE_BYTES) -> bytes:
        """The file bytes of one picture. Raises FileNotFoundError if it is gone.

        Raises ForeignObjectError if the path is not one that `write` gives, or the picture has more than `limit` bytes.
        """
        place = _PICTURE.fullmatch(path)
        if place is None or not path.startswith(f"images/{int(place[1]) // PER_FOLDER:05d}/"):
            raise ForeignObjectError(f"{path!r} is no name of a picture; {FOREIGN_REMEDY}")
        return self._storage.read(path, min(limit, MAX_PICTURE_BYTES))

    def read_row(self, row: Mapping[str, Any]) -> bytes:
        """The file bytes of a row's picture, as they were committed. Raises LostPictureError if they are not there."""
        if row["image"] is None:
            raise LostPictureError("its row names no file")
        try:
            data = self.read(row["image"], row["bytes"] or 0)
        except FileNotFoundError:
            raise LostPictureError("it is missing") from None
        except ForeignObjectError as error:
            raise LostPictureError(str(error)) from error
        if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise LostPictureError("it has not the sha256 of its row")
        return data

    def sizes(self, chunk: int, attempt: str, repair: int = 0) -> Mapping[str, int]:
        """Size by path of everything that lies under one attempt, by one listing of its folder."""
        return dict(self._storage.list(attempt_folder(chunk, attempt, repair)))


def attempt_folder(chunk: int, attempt: str, repair: int = 0) -> str:
    """The folder that belongs to one attempt at one chunk, or at one repair of it, alone."""
    number = f"r{repair}-" if repair else ""
    return f"images/{chunk // PER_FOLDER:05d}/{chunk:08d}-{number}{attempt}"


def picture_path(chunk: int, attempt: str, sample_id: str, repair: int = 0) -> str:
    """Where the picture of one sample lies."""
    return f"{attempt_folder(chunk, attempt, repair)}/{sample_id}.png"
