"""What failed, and why: read from the published parts, so that it covers all runs of the job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.compute as pc

from latentmill.jobs.job import Job
from latentmill.jobs.outputs.publish import Publication, read_columns

FAILURES_SHOWN = 20
_COLUMNS = ("sample_id", "row_id", "prompt", "error", "status")


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRow:
    """A sample that failed. All of it but `sample_id` is untrusted text."""

    sample_id: str
    row_id: str
    prompt: str
    error: str


def failed_rows(job: Job, publication: Publication, limit: int = FAILURES_SHOWN) -> tuple[FailedRow, ...]:
    """The first `limit` failed rows of a publication, in order of sample_id; nothing is read if there are none.

    Parts are read one at a time, and no more of them than needed.
    """
    wanted = min(limit, publication.counts["failed"])
    found: list[FailedRow] = []
    rows = _failed(job, publication)
    while len(found) < wanted and (row := next(rows, None)) is not None:
        found.append(row)
    return tuple(found)


def _failed(job: Job, publication: Publication) -> Iterator[FailedRow]:
    for part in publication.parts:
        try:
            table = read_columns(job, part, _COLUMNS)
        except FileNotFoundError:
            return  # a repair was published, and these parts were removed: they are no longer what failed
        rows = table.filter(pc.equal(table["status"], "failed"))
        yield from (FailedRow(**row) for row in rows.drop_columns(["status"]).to_pylist())
