"""The set of commit records, and of the repairs beside them. Nothing else is trusted.

A record is created once and never changed or deleted. Two attempts at one chunk may race: the store lets one create
win, and the other learns that it lost by reading the winner's record.

A repair record, `{chunk}.r1.parquet` and so on, supersedes rows of its chunk that failed, and nothing else. Its number
says on top of what it was made: whoever creates number 2 has read number 1, so what number 2 repairs never changes
either, and an attempt that was overtaken finds its number taken. A chunk's *effective* record is its commit record with
all its repairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from latentmill.jobs.errors import OutputConflictError
from latentmill.jobs.ledger.records import (
    MAX_BYTES,
    CommitRecord,
    DamagedRecordError,
    WrongRepairError,
    decode_record,
    strange_value,
)
from latentmill.jobs.spec import MAX_CHUNK
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage

Outcome = Literal["mine", "lost"]

PER_FOLDER = 1000
_LIST_THREADS = 16
_REPAIR_NAME = re.compile(r"(\d{8,})\.r([1-9]\d*)\.parquet", re.ASCII)


def record_path(chunk: int) -> str:
    """Where the commit record of a chunk lies."""
    return f"ledger/{chunk // PER_FOLDER:05d}/{chunk:08d}.parquet"


def repair_path(chunk: int, number: int) -> str:
    """Where a chunk's repair record of that number lies; the numbers begin at 1."""
    return f"ledger/{chunk // PER_FOLDER:05d}/{chunk:08d}.r{number}.parquet"


def chunk_of_path(path: str) -> int | None:
    """The chunk of a commit record's path; None for any other file, repair records among them."""
    name = path.rpartition("/")[2]
    stem = name.removesuffix(".parquet")
    if len(stem) < 8 or not (stem.isascii() and stem.isdecimal()):
        return None
    chunk = int(stem)
    return chunk if record_path(chunk) == path else None


def repair_of_path(path: str) -> tuple[int, int] | None:
    """Chunk and number of a repair record's path; None for any other file."""
    name = _REPAIR_NAME.fullmatch(path.rpartition("/")[2])
    if name is None:
        return None
    chunk, number = int(name[1]), int(name[2])
    return (chunk, number) if repair_path(chunk, number) == path else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerListing:
    """What the ledger held when it was listed, by names alone. Later it can only hold more."""

    committed: NDArray[np.bool_]
    """One flag per chunk."""
    repairs: Mapping[int, int]
    """The highest number of a repair, by chunk; chunks without one are not in it."""

    @property
    def n_repairs(self) -> int:
        """Repair records in all: numbers have no gaps."""
        return sum(self.repairs.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """The commit records of one plan in one output."""

    storage: Storage
    plan_hash: str
    n_chunks: int
    schema: pa.Schema
    chunk_size: int = MAX_CHUNK
    """The most rows of a record."""

    def commit(self, chunk: int, attempt: str, data: bytes) -> Outcome:
        """Create the chunk's record. `mine` if this attempt's record stands, `lost` if another attempt's does.

        A create that is refused, or whose answer is lost, says nothing by itself: the record that stands decides. If
        none can be read, the StorageError goes on, and the chunk is tried again later. Raises OutputConflictError if
        the record belongs to another plan.
        """
        return self._create(chunk, 0, attempt, data)

    def commit_repair(self, chunk: int, number: int, attempt: str, data: bytes) -> Outcome:
        """Create the chunk's repair record of that number, as `commit` does.

        `number` is `repairs + 1` of the effective record whose failed rows were made again. `lost` says that another
        driver has repaired the chunk meanwhile: what still fails is in the new effective record.
        """
        return self._create(chunk, number, attempt, data)

    def read(self, chunk: int) -> CommitRecord | None:
        """The commit record of a chunk, checked, without its repairs; None if the chunk is not committed.

        Raises DamagedRecordError for one that changed since it was written, OutputConflictError for another plan's.
        """
        return self._read(chunk, 0)

    def effective(self, chunk: int, repairs: int | None = None) -> CommitRecord | None:
        """The chunk's rows after its repairs; `.repairs` says how many. None if the chunk is not committed.

        `repairs` is how many a listing has seen: exactly those are read, and none is looked for. Without it, they are
        read until there is no next one, which costs a request more. Raises as `read` does, and DamagedRecordError for
        a repair that is not there though it was listed, or that changes more than rows which failed.
        """
        record = self.read(chunk)
        if record is None:
            return None
        while repairs is None or record.repairs < repairs:
            further = self.with_next_repair(record)
            if further is None:
                if repairs is None:
                    break
                raise DamagedRecordError(
                    f"repair record {repair_path(chunk, record.repairs + 1)} in {self.storage.url} is missing, number "
                    f"{repairs} is there; restore it from a copy, or make the dataset again in a new --out"
                )
            record = further
        return record

    def with_next_repair(self, record: CommitRecord) -> CommitRecord | None:
        """The record with one repair more; None if there is no further one. Raises as `effective` does."""
        chunk, number = record.chunk, record.repairs + 1
        repair = self._read(chunk, number)
        if repair is None:
            return None
        try:
            return record.with_repair(repair)
        except WrongRepairError as error:
            raise WrongRepairError(
                f"repair record {repair_path(chunk, number)} in {self.storage.url} is wrong: {error}; restore it from "
                f"a copy, or make the dataset again in a new --out"
            ) from error

    def failed_samples(self, chunk: int, repairs: int | None = None) -> tuple[int, ...]:
        """Places within the chunk of the rows that failed and were not repaired. Raises as `effective` does."""
        record = self.effective(chunk, repairs)
        return () if record is None else record.failed()

    def failed_chunks(self) -> Iterator[int]:
        """The committed chunks that have rows which still fail, in order. Reads every record, several at a time."""
        listing = self.listing()
        chunks: list[int] = np.flatnonzero(listing.committed).tolist()

        def has_failed(chunk: int) -> bool:
            return bool(self.failed_samples(chunk, listing.repairs.get(chunk, 0)))

        with ThreadPoolExecutor(_LIST_THREADS) as pool:
            for start in range(0, len(chunks), PER_FOLDER):
                batch = chunks[start : start + PER_FOLDER]
                yield from (chunk for chunk, failed in zip(batch, pool.map(has_failed, batch), strict=True) if failed)

    def committed(self) -> NDArray[np.bool_]:
        """One flag per chunk. The folders are listed in parallel and no record is read."""
        return self.listing().committed

    def repairs(self) -> Mapping[int, int]:
        """The highest number of a repair, by chunk, from the same listing."""
        return self.listing().repairs

    def listing(self) -> LedgerListing:
        """Everything that the names alone say. The folders are listed in parallel and no record is read."""
        committed = np.zeros(self.n_chunks, dtype=np.bool_)
        repairs: dict[int, int] = {}
        folders = range((self.n_chunks + PER_FOLDER - 1) // PER_FOLDER)

        def mark(folder: int) -> None:
            for path, _ in self.storage.list(f"ledger/{folder:05d}"):
                chunk = chunk_of_path(path)
                if chunk is not None:
                    if chunk < self.n_chunks:
                        committed[chunk] = True
                    continue
                repair = repair_of_path(path)
                if repair is not None and repair[0] < self.n_chunks:
                    repairs[repair[0]] = max(repair[1], repairs.get(repair[0], 0))  # a chunk is in one folder only

        with ThreadPoolExecutor(min(_LIST_THREADS, max(1, len(folders)))) as pool:
            for _ in pool.map(mark, folders):
                pass
        return LedgerListing(committed=committed, repairs={chunk: repairs[chunk] for chunk in sorted(repairs)})

    def _create(self, chunk: int, number: int, attempt: str, data: bytes) -> Outcome:
        path = _path(chunk, number)
        try:
            if self.storage.create(path, data):
                return "mine"
        except StorageError:
            record = self._read_after_failure(chunk, number)
            if record is None:
                raise
        else:
            record = self._read(chunk, number)  # a refusal to show it is not its absence, and goes on as it is
            if record is None:
                raise StorageError(
                    f"{path} in {self.storage.url} refuses a create and does not exist either; "
                    f"the store is not consistent: use another one"
                )
        return "mine" if record.attempt == attempt else "lost"

    def _read(self, chunk: int, number: int) -> CommitRecord | None:
        path = _path(chunk, number)
        name = f"{'repair' if number else 'commit'} record {path} in {self.storage.url}"
        try:
            data = self.storage.read(path, MAX_BYTES)
        except FileNotFoundError:
            return None
        try:
            record = decode_record(data, max_rows=self.chunk_size)
        except DamagedRecordError as error:
            raise DamagedRecordError(
                f"{name} is damaged: {error}; restore it from a copy, or make the dataset again in a new --out"
            ) from error
        if record.plan_hash != self.plan_hash:
            raise OutputConflictError(
                f"{name} belongs to plan {record.plan_hash[:12]}, not to {self.plan_hash[:12]}; use another --out"
            )
        if (record.chunk, record.repair) != (chunk, number) or not record.table.schema.equals(
            self.schema.remove_metadata()
        ):
            raise DamagedRecordError(
                f"{name} is not this chunk's: it says chunk {record.chunk}, repair {record.repair}, with "
                f"{record.table.num_columns} columns; restore it from a copy"
            )
        strange = strange_value(record.table)
        if strange is not None:
            raise DamagedRecordError(
                f"{name} has a row that no job writes ({strange}); restore it from a copy, or make the dataset again "
                f"in a new --out"
            )
        return record

    def _read_after_failure(self, chunk: int, number: int) -> CommitRecord | None:
        try:
            return self._read(chunk, number)
        except StorageError:
            return None  # still unknown, and unknown is not failure: the caller raises what it had first


def _path(chunk: int, number: int) -> str:
    return repair_path(chunk, number) if number else record_path(chunk)
