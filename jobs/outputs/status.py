"""Where a job stands, from its output alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.commit_times import CommitTimes
from latentmill.jobs.outputs.making import Making, how_made
from latentmill.jobs.outputs.pace import Pace
from latentmill.jobs.outputs.publish import standing_publication
from latentmill.jobs.plans.columns import STATUSES


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusReport:
    """Counts are None where nothing has counted them: before publication, only a deep look reads the records."""

    out: str
    plan_hash: str
    rows: int
    rejected_rows: int
    samples: int
    chunks: int
    chunks_committed: int
    repairs: int
    """Repair records, which `run --retry-failed` made; the counts include them."""
    published: bool
    counts: dict[str, int] | None
    samples_committed: int
    making: Making | None = None
    """How a published dataset was made."""
    pace: Pace | None = None
    """How fast it is going on, of a job that is watched."""

    @property
    def state(self) -> str:
        """`published`, `complete` (every chunk committed, not yet published as it is now), `started` or `planned`."""
        if self.published:
            return "published"
        if self.chunks_committed == self.chunks:
            return "complete"
        return "started" if self.chunks_committed else "planned"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = {name: value for name, value in asdict(self).items() if value is not None or name == "counts"}
        return {"state": self.state, **found}


def status(out_url: str, *, deep: bool = False) -> StatusReport:
    """Where the job in an output stands. Lists the ledger; `deep` also reads every record.

    Of a published dataset, it also reads some records to say how it was made. Raises UsageError if the output has no
    plan.
    """
    job = open_job(out_url)
    commits = CommitTimes(job.storage, job.plan.n_chunks)
    commits.look()
    committed, repairs = commits.committed, commits.repairs
    publication = standing_publication(job)
    counts = None if publication is None else publication.counts
    if deep and counts is None:
        counts = dict.fromkeys(STATUSES, 0)
        chunks: list[int] = np.flatnonzero(committed).tolist()
        with ThreadPoolExecutor(16) as pool:
            for record in pool.map(job.ledger.effective, chunks, [repairs.get(chunk, 0) for chunk in chunks]):
                if record is None:
                    raise JobError(f"a commit record vanished from {job.storage.url} while it was read")
                for name, count in record.counts().items():
                    counts[name] += count
    return StatusReport(
        out=job.storage.url,
        plan_hash=job.plan.plan_hash,
        rows=job.plan.n_rows,
        rejected_rows=job.plan.n_rejected,
        samples=job.plan.n_samples,
        chunks=job.plan.n_chunks,
        chunks_committed=int(committed.sum()),
        repairs=sum(repairs.values()),
        published=publication is not None,
        counts=counts,
        samples_committed=job.plan.samples_in_chunks(committed),
        making=None if publication is None else how_made(job, publication, commits),
    )
