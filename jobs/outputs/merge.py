"""The rows of all chunks in the dataset's order: a merge of sorted streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.records import CommitRecord
from latentmill.jobs.outputs.captions import Fetch
from latentmill.jobs.plans.grid import Piece
from latentmill.jobs.plans.planned import Plan

_READ_AHEAD = 32
_READ_THREADS = 16


def merged_tables(job: Job, fetch: Fetch, rows_per_part: int) -> Iterator[pa.Table]:
    """All rows in order of sample_id, `rows_per_part` at a time.

    Within one group of the plan, chunks and their rows ascend, so this is a merge of as many sorted streams as there
    are groups; memory holds one part, and what was read ahead. A chunk is read once, also where groups share it. Raises
    JobError unless every sample is there once.
    """
    groups = job.plan.pieces_of_groups()
    ahead = max(1, _READ_AHEAD // max(1, len(groups)))
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        reads = _Reads(job.plan, fetch, pool)
        streams = [_Stream(pieces, reads, ahead) for pieces in groups]
        for start in range(0, job.plan.n_samples, rows_per_part):
            end = min(start + rows_per_part, job.plan.n_samples)
            pieces = [piece for stream in streams for piece in stream.take(end)]
            table = pa.concat_tables([job.ledger.schema.empty_table(), *pieces])
            ordinals = _ordinals(table)
            order = np.argsort(ordinals, kind="stable")
            if not np.array_equal(ordinals[order], np.arange(start, end)):
                raise JobError(
                    f"samples {start}..{end - 1} are not in the ledger exactly once ({len(ordinals)} rows for "
                    f"{end - start} samples); run `latentmill verify` to see which"
                )
            yield table.take(pa.array(order)).combine_chunks()


class _Reads:
    """Chunks read by a pool's threads. One that several groups share is kept until the last of them has asked."""

    def __init__(self, plan: Plan, fetch: Fetch, pool: ThreadPoolExecutor) -> None:
        self._plan = plan
        self._fetch = fetch
        self._pool = pool
        self._shared: dict[int, tuple[Future[CommitRecord], int]] = {}

    def begin(self, chunk: int) -> Future[CommitRecord]:
        """The chunk's record, now or later."""
        if chunk in self._shared:
            record, asking = self._shared.pop(chunk)
        else:
            record, asking = self._pool.submit(self._fetch, chunk), self._plan.groups_in(chunk)
        if asking > 1:
            self._shared[chunk] = (record, asking - 1)
        return record


class _Stream:
    """The rows of one group, in order, read ahead."""

    def __init__(self, pieces: Iterator[Piece], reads: _Reads, ahead: int) -> None:
        self._pieces = pieces
        self._reads = reads
        self._ahead = ahead
        self._waiting: deque[tuple[Future[CommitRecord], slice]] = deque()
        self._rest: pa.Table | None = None

    def take(self, end: int) -> Iterator[pa.Table]:
        """The next rows whose ordinal is below `end`."""
        while True:
            table = self._rest if self._rest is not None else self._next()
            if table is None:
                return
            split = int(np.searchsorted(_ordinals(table), end))
            if split:
                yield table.slice(0, split)
            if split < table.num_rows:
                self._rest = table.slice(split)
                return
            self._rest = None

    def _next(self) -> pa.Table | None:
        while len(self._waiting) < self._ahead and (piece := next(self._pieces, None)) is not None:
            self._waiting.append((self._reads.begin(piece.chunk), piece.places))
        if not self._waiting:
            return None
        record, places = self._waiting.popleft()
        return record.result().table[places]


def _ordinals(table: pa.Table) -> NDArray[np.int64]:
    ordinals: NDArray[np.int64] = pc.cast(table.column("sample_id"), pa.int64()).to_numpy()
    return ordinals
