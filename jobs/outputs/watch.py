"""An output that is looked at again and again: where it stands, and how fast it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.commit_times import CommitTimes
from latentmill.jobs.ledger.records import CommitRecord, DamagedRecordError
from latentmill.jobs.outputs.pace import PaceOfLedger
from latentmill.jobs.outputs.publish import load_publication
from latentmill.jobs.outputs.status import StatusReport
from latentmill.jobs.outputs.status import status as output_status
from latentmill.jobs.plans.columns import STATUSES

RECORDS_READ = 16
"""Of the records that are new at a look, so many of the newest are read."""


class OutputWatch:
    """Looks at one output. Each look reads what is new: listings of folders that are being filled, and a few records.

    Raises UsageError if the output has no plan.
    """

    def __init__(self, out_url: str, *, deep: bool, clock: Callable[[], float] = time.time) -> None:
        self._url = out_url
        self._deep = deep
        self._clock = clock
        self._job: Job = open_job(out_url)
        self._commits = CommitTimes(self._job.storage, self._job.plan.n_chunks)
        self._pace = PaceOfLedger(self._job.plan)
        self._counts = dict.fromkeys(STATUSES, 0)
        self._looked = False
        self._ahead: float | None = None
        """By how much this clock is ahead of the store's, at most; known once a commit was seen to come."""

    def look(self) -> StatusReport:
        """Where the output stands now. `deep` counts what was committed; what repairs changed since, the end says."""
        if load_publication(self._job) is not None:
            report = output_status(self._url, deep=self._deep)
            if report.published:
                return report
        new = self._commits.look()
        self._read(new)
        plan, repairs = self._job.plan, self._commits.repairs
        return StatusReport(
            out=self._job.storage.url,
            plan_hash=plan.plan_hash,
            rows=plan.n_rows,
            rejected_rows=plan.n_rejected,
            samples=plan.n_samples,
            chunks=plan.n_chunks,
            chunks_committed=int(self._commits.committed.sum()),
            repairs=sum(repairs.values()),
            published=False,
            counts=dict(self._counts) if self._deep else None,
            samples_committed=plan.samples_in_chunks(self._commits.committed),
            pace=self._pace.at(self._commits.times, self._store_time(new)),
        )

    def _store_time(self, new: list[int]) -> float:
        """What time it is by the clock that the commits have their times from, as far as that can be told."""
        now = self._clock()
        if new and self._looked:
            ahead = now - float(self._commits.times[new].max())
            self._ahead = ahead if self._ahead is None else min(ahead, self._ahead)
        self._looked = True
        return now - (self._ahead or 0.0)

    def _read(self, new: list[int]) -> None:
        """Take in what the records of new commits say, all of them or the newest."""
        new.sort(key=lambda chunk: self._commits.times[chunk])
        chosen = new if self._deep else new[-RECORDS_READ:]
        with ThreadPoolExecutor(RECORDS_READ) as pool:
            for chunk, record in zip(chosen, self._records(pool, chosen), strict=True):
                if record is not None:
                    self._pace.note(record, float(self._commits.times[chunk]))
                    for status, count in record.counts().items():
                        self._counts[status] += count

    def _records(self, pool: ThreadPoolExecutor, chunks: list[int]) -> Iterable[CommitRecord | None]:
        def read(chunk: int) -> CommitRecord | None:
            try:
                return self._job.ledger.read(chunk)
            except DamagedRecordError:
                return None  # `verify` says what is wrong with it; the job goes on

        return pool.map(read, chunks)
