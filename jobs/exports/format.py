"""What every export is made of: shards of rows with their pictures in, files out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from latentmill.jobs.outputs.publish import Publication
from latentmill.jobs.plans.plan import Plan

Encode = Callable[[bytes, tuple[int, int], int | None], bytes]
"""A PNG, its size, and a quality; the picture in another form."""

Run = Callable[[Any, Sequence[int]], Iterator[Any]]
"""An export (shards.py) and the numbers of its shards; their records (documents.py), as they come."""

File = tuple[str, bytes]
"""A path below the export, and what the file holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Rows that are written together: the `index`th of `count` of its split, from row `start` to before row `stop`.

    Of these it has those that are exported and belong to its split. `alone`: no splits were asked for.
    """

    split: str
    index: int
    count: int
    start: int
    stop: int
    rows: int
    alone: bool

    @property
    def name(self) -> str:
        """As the Hugging Face hub names files: `train-00000-of-00012`."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"

    @property
    def folder(self) -> str:
        """Where pictures of its own lie, for formats that have such."""
        return f"{self.split}/{self.index:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture as it is exported; `key` is its sample_id."""

    key: str
    suffix: str
    data: bytes

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.key}.{self.suffix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file of an export, as it was written."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """An export whose shards are all there. `read` reads one of its files."""

    plan: Plan
    publication: Publication
    options: Mapping[str, Any]
    schema: pa.Schema
    shards: Sequence[tuple[Shard, Sequence[WrittenFile]]]
    read: Callable[[str], bytes]
    signing: Mapping[str, Any] | None = None
    """By whom the pictures are signed (signing.py), if they are."""

    def files_by_split(self) -> dict[str, list[WrittenFile]]:
        """The files of each split, in order."""
        found: dict[str, list[WrittenFile]] = {}
        for shard, files in self.shards:
            found.setdefault(shard.split, []).extend(files)
        return found

    def rows_by_split(self) -> dict[str, int]:
        """The rows of each split."""
        found: dict[str, int] = {}
        for shard, _ in self.shards:
            found[shard.split] = found.get(shard.split, 0) + shard.rows
        return found


class ExportFormat(ABC):
    """Both functions are pure: the same rows and pictures always give the same files.

    `rows` has the columns of the dataset without the picture's path, and the size and digest of the exported picture
    as `exported_bytes` and `exported_sha256`; `taken` are names that the format needs for columns of its own.
    """

    taken: tuple[str, ...] = ()

    @abstractmethod
    def files(self, shard: Shard, rows: pa.Table, pictures: Sequence[Picture]) -> Iterable[File]:
        """The files of a shard. Their names are no other shard's."""

    def last_files(self, written: Written) -> Iterable[File]:  # noqa: ARG002 - most formats have none
        """What is told of all shards together, once they are there."""
        return ()
