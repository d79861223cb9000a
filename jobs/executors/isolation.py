"""Which sample of a chunk breaks its worker: the chunk runs alone, then its rows one by one; only the culprit fails.

A death may be anybody's fault, so nothing is held against a chunk before it has failed alone `TRIES` times, nor against
a row before a batch of empty prompts has shown that the machine itself still works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from latentmill.jobs.finishing import FinishedSample, failed_sample
from latentmill.jobs.job import Job
from latentmill.jobs.worker import Receipt

T = TypeVar("T")

TRIES = 3

DIED = f"the process that drew it died, {TRIES} times while it ran alone"
OVERRAN = f"it was not finished within its deadline, {TRIES} times while it ran alone"
_OUT_OF_MEMORY = re.compile(r"out of memory|MemoryError", re.IGNORECASE)


class TroubleError(Exception):
    """A try that ended in an exception, a death or a missed deadline; the text says which."""


class Cell(Protocol):
    """A worker with nothing beside it, replaced when it is broken. Its methods raise TroubleError."""

    @property
    def execution_class(self) -> str: ...

    def chunk(self, chunk: int) -> Receipt:
        """Generate, finish and commit the whole chunk. What the chunk cannot be blamed for is in the receipt."""

    def row(self, chunk: int, row: int) -> FinishedSample:
        """Generate and finish one row."""

    def control(self, chunk: int) -> None:
        """Generate a batch of empty prompts of the chunk's shape."""

    def commit(self, chunk: int, finished: Sequence[FinishedSample], repair: int) -> Receipt:
        """Write and commit what is finished, as the repair of that number if it is not 0; raises no TroubleError."""


def isolate_chunk(job: Job, cell: Cell, chunk: int, *, repair: bool, stopping: Callable[[], bool]) -> Receipt:
    """`isolate` for all rows of an open chunk, or for the failed rows of a committed one."""
    if not repair:
        every = range(len(job.plan.samples_of_chunk(chunk)))
        return isolate(job, cell, chunk, every, stopping=stopping)
    record = job.ledger.effective(chunk)
    rows = () if record is None else record.failed()
    if record is None or not rows:
        return Receipt(chunk=chunk, outcome="already" if record else "skipped")
    return isolate(job, cell, chunk, rows, repair=record.repairs + 1, stopping=stopping)


def isolate(
    job: Job, cell: Cell, chunk: int, rows: Sequence[int], *, repair: int = 0, stopping: Callable[[], bool]
) -> Receipt:
    """Afterwards the chunk's `rows` are committed, culprits as failed; or the receipt says why they are not.

    If a batch of empty prompts fails as well, no row is blamed, but for want of memory: at one batch shape that is what
    the plan asks of this device, and it is the chunk's own as long as other chunks are committed.
    """
    whole = _try(lambda: cell.chunk(chunk))
    if isinstance(whole, Receipt):
        return whole
    control = _try(lambda: cell.control(chunk))
    if isinstance(control, TroubleError):
        hungry = _OUT_OF_MEMORY.search(str(whole)) and _OUT_OF_MEMORY.search(str(control))
        if not hungry or not job.ledger.committed().any():
            remedy = (
                "plan the job with a smaller --batch-size" if hungry else "repair the machine, its prompts are sound"
            )
            error = f"chunk {chunk} fails alone ({whole}), and so does a batch of empty prompts ({control}): {remedy}"
            return Receipt(chunk=chunk, outcome="error", error=error)
    samples = job.plan.samples_of_chunk(chunk)
    finished = []
    for row in rows:
        if stopping():
            return Receipt(chunk=chunk, outcome="skipped")
        alone = _try(partial(cell.row, chunk, row))
        if isinstance(alone, TroubleError):
            slot = row % job.plan.batch_size
            alone = failed_sample(job.plan, samples[row], slot, str(alone), cell.execution_class)
        finished.append(alone)
    return cell.commit(chunk, finished, repair)


def _try(call: Callable[[], T]) -> T | TroubleError:
    for _ in range(TRIES):
        try:
            return call()
        except TroubleError as error:
            trouble = error
    return trouble
