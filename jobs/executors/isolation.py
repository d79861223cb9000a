"""Which sample of a chunk breaks its worker: the chunk runs isolated, then its rows one by one; only the culprit fails.

A death may be anybody's fault, so nothing is held against a chunk before it has failed in isolation `TRIES` times, nor
against a row before a batch of empty prompts has shown that the machine itself still works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.job import Job
from latentmill.jobs.postprocess import ProcessedSample, failed_sample

T = TypeVar("T")

TRIES = 3

DIED = f"the process that drew it died, {TRIES} times while it ran alone"
OVERRAN = f"it was not finished within its deadline, {TRIES} times while it ran alone"
_OUT_OF_MEMORY = re.compile(r"out of memory|MemoryError", re.IGNORECASE)


class IsolatedWorker(Protocol):
    """A ChunkRunner with nothing beside it, replaced when it is broken: its death is told as a result, too."""

    @property
    def execution_class(self) -> str: ...
    def chunk(self, chunk: int, *, repair: bool) -> ChunkResult: ...
    def row(self, chunk: int, row: int) -> ProcessedSample | ChunkResult: ...
    def control(self, chunk: int) -> ChunkResult | None: ...
    def commit(self, chunk: int, samples: Sequence[ProcessedSample], repair: int) -> ChunkResult: ...


def isolate_chunk(
    job: Job, worker: IsolatedWorker, chunk: int, *, repair: bool, stopping: Callable[[], bool]
) -> ChunkResult:
    """`isolate` for all rows of an open chunk, or for the failed rows of a committed one."""
    if not repair:
        every = range(len(job.plan.samples_of_chunk(chunk)))
        return isolate(job, worker, chunk, every, stopping=stopping)
    record = job.ledger.effective(chunk)
    rows = () if record is None else record.failed()
    if record is None or not rows:
        return ChunkResult(chunk=chunk, outcome="already" if record else "skipped")
    return isolate(job, worker, chunk, rows, repair=record.repairs + 1, stopping=stopping)


def isolate(
    job: Job, worker: IsolatedWorker, chunk: int, rows: Sequence[int], *, repair: int = 0, stopping: Callable[[], bool]
) -> ChunkResult:
    """Afterwards the chunk's `rows` are committed, culprits as failed; or the result says why they are not.

    If a batch of empty prompts fails as well, no row is blamed, but for want of memory: at one batch shape that is what
    the plan asks of this device, and it is the chunk's own as long as other chunks are committed.
    """
    whole = _tried(partial(worker.chunk, chunk, repair=repair > 0))
    if whole.blame != "chunk":
        return whole
    control = _tried(partial(worker.control, chunk))
    if control is not None:
        hungry = _OUT_OF_MEMORY.search(f"{whole.error}") and _OUT_OF_MEMORY.search(f"{control.error}")
        if control.blame != "chunk":
            return control
        if not hungry or not job.ledger.committed().any():
            remedy = (
                "plan the job with a smaller --batch-size" if hungry else "repair the machine, its prompts are sound"
            )
            error = (
                f"chunk {chunk} fails alone ({whole.error}), and so does a batch of empty prompts ({control.error}): "
                f"{remedy}"
            )
            return ChunkResult(chunk=chunk, outcome="error", error=error)
    samples = job.plan.samples_of_chunk(chunk)
    processed = []
    for row in rows:
        if stopping():
            return ChunkResult(chunk=chunk, outcome="skipped")
        made = _tried(partial(worker.row, chunk, row))
        if isinstance(made, ChunkResult):
            if made.blame != "chunk":
                return made
            slot = row % job.plan.batch_size
            made = failed_sample(job.plan, samples[row], slot, f"{made.error}", worker.execution_class)
        processed.append(made)
    return worker.commit(chunk, processed, repair)


def _tried(step: Callable[[], T]) -> T:
    """What the step gives, tried again as long as that may be the chunk's fault, `TRIES` times in all."""
    outcome = step()
    for _ in range(TRIES - 1):
        if not (isinstance(outcome, ChunkResult) and outcome.blame == "chunk"):
            break
        outcome = step()
    return outcome
