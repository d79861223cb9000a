"""The set of commit records: which chunks are done, by which attempt. Nothing else is trusted.

A record is created once and never changed or deleted. Two attempts at one chunk may race: the store lets one create
win, and the other learns that it lost by reading the winner's record.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.errors import OutputConflictError
from jobs.outputs.records import CommitRecord, DamagedRecordError, decode_record
from jobs.store.errors import StorageError
from jobs.store.storage import Storage

Outcome = Literal["mine", "lost"]

PER_FOLDER = 1000
_LIST_THREADS = 16


def record_path(chunk: int) -> str:
    """Where the commit record of a chunk lies."""
    return f"ledger/{chunk // PER_FOLDER:05d}/{chunk:08d}.parquet"


def chunk_of_path(path: str) -> int | None:
    """The chunk of a commit record's path; None for any other file."""
    name = path.rpartition("/")[2]
    stem = name.removesuffix(".parquet")
    if len(stem) < 8 or not (stem.isascii() and stem.isdecimal()):
        return None
    chunk = int(stem)
    return chunk if record_path(chunk) == path else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """The commit records of one plan in one output."""

    storage: Storage
    plan_hash: str
    n_chunks: int
    schema: pa.Schema

    def commit(self, chunk: int, attempt: str, data: bytes) -> Outcome:
        """Create the chunk's record. `mine` if this attempt's record stands, `lost` if another attempt's does.

        A create that is refused, or whose answer is lost, says nothing by itself: the record that stands decides. If
        none can be read, the StorageError goes on, and the chunk is tried again later. Raises OutputConflictError if
        the record belongs to another plan.
        """
        try:
            if self.storage.create(record_path(chunk), data):
                return "mine"
        except StorageError:
            record = self._read_after_failure(chunk)
            if record is None:
                raise
        else:
            record = self._read_after_failure(chunk)
            if record is None:
                raise StorageError(
                    f"{record_path(chunk)} in {self.storage.url} refuses a create and does not exist either; "
                    f"the store is not consistent: use another one"
                )
        return "mine" if record.attempt == attempt else "lost"

    def read(self, chunk: int) -> CommitRecord | None:
        """The record of a chunk, checked; None if the chunk is not committed.

        Raises DamagedRecordError for one that changed since it was written, OutputConflictError for another plan's.
        """
        try:
            data = self.storage.read(record_path(chunk))
        except FileNotFoundError:
            return None
        try:
            record = decode_record(data)
        except DamagedRecordError as error:
            raise DamagedRecordError(
                f"commit record {record_path(chunk)} in {self.storage.url} is damaged: {error}; restore it from a "
                f"copy, or make the dataset again in a new --out"
            ) from error
        if record.plan_hash != self.plan_hash:
            raise OutputConflictError(
                f"commit record {record_path(chunk)} in {self.storage.url} belongs to plan {record.plan_hash[:12]}, "
                f"not to {self.plan_hash[:12]}; use another --out"
            )
        if record.chunk != chunk or not record.table.schema.equals(self.schema.remove_metadata()):
            raise DamagedRecordError(
                f"commit record {record_path(chunk)} in {self.storage.url} is not this chunk's: it says chunk "
                f"{record.chunk}, with {record.table.num_columns} columns; restore it from a copy"
            )
        return record

    def committed(self) -> NDArray[np.bool_]:
        """One flag per chunk. The folders are listed in parallel and no record is read."""
        flags = np.zeros(self.n_chunks, dtype=np.bool_)
        folders = range((self.n_chunks + PER_FOLDER - 1) // PER_FOLDER)

        def mark(folder: int) -> None:
            for path, _ in self.storage.list(f"ledger/{folder:05d}"):
                chunk = chunk_of_path(path)
                if chunk is not None and chunk < self.n_chunks:
                    flags[chunk] = True

        with ThreadPoolExecutor(min(_LIST_THREADS, max(1, len(folders)))) as pool:
            for _ in pool.map(mark, folders):
                pass
        return flags

    def _read_after_failure(self, chunk: int) -> CommitRecord | None:
        try:
            return self.read(chunk)
        except StorageError:
            return None  # still unknown, and unknown is not failure: the caller raises what it had first
