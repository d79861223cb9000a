"""Where a job stands, from its output alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
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
        return {"state": self.state, **asdict(self)}


def status(out_url: str, *, deep: bool = False) -> StatusReport:
    """Where the job in an output stands. Lists the ledger; `deep` also reads every record.

    Raises UsageError if the output has no plan.
    """
    job = open_job(out_url)
    listing = job.ledger.listing()
    publication = standing_publication(job)
    counts = None if publication is None else publication.counts
    if deep and counts is None:
        counts = dict.fromkeys(STATUSES, 0)
        chunks: list[int] = np.flatnonzero(listing.committed).tolist()
        with ThreadPoolExecutor(16) as pool:
            for record in pool.map(job.ledger.effective, chunks, [listing.repairs.get(chunk, 0) for chunk in chunks]):
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
        chunks_committed=int(listing.committed.sum()),
        repairs=listing.n_repairs,
        published=publication is not None,
        counts=counts,
    )
