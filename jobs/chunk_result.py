"""The outcome of one attempt at one chunk, for the caller's information; the ledger decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from latentmill.jobs.errors import JobError, OutputConflictError
from latentmill.jobs.stages import Stage
from latentmill.jobs.store.errors import StorageError

Blame = Literal["chunk", "store", "conflict", "elsewhere"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """How a try ended.

    `committed`: this try's record stands. `already`: the chunk was committed before, nothing was generated.
    `lost`: another attempt committed it first. `unrepaired`: a repair whose rows all failed again, nothing was written.
    `skipped`: it was not tried, and is still open. `error`: it was tried, and is still open; `blame` says what may be
    at fault: the chunk itself, a store that will not get better by waiting, or a record of another plan.

    `stages` are the seconds that the try spent in each stage, as far as it came to an end. `reused` counts those of its
    samples that another output had; `notes` say what was wrong with such.
    """

    chunk: int
    outcome: Literal["committed", "already", "lost", "unrepaired", "skipped", "error"]
    ok: int = 0
    flagged: int = 0
    failed: int = 0
    error: str | None = None
    blame: Blame = "elsewhere"
    actor: str = ""
    stages: Mapping[Stage, float] = field(default_factory=dict)
    reused: int = 0
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the chunk is committed, by whomever."""
        return self.outcome not in {"error", "skipped"}


def failed_result(chunk: int, error: Exception, actor: str = "") -> ChunkResult:
    """The result of a try that ended in an exception: what a job's own errors say is not the chunk's fault."""
    blame: Blame = "chunk"
    if isinstance(error, JobError):
        lasting = isinstance(error, StorageError) and not error.transient
        blame = "conflict" if isinstance(error, OutputConflictError) else "store" if lasting else "elsewhere"
    text = str(error) if isinstance(error, JobError) else describe_fault(error)
    return ChunkResult(chunk=chunk, outcome="error", error=text, blame=blame, actor=actor)


def describe_fault(error: BaseException) -> str:
    """An exception that is not of ours, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
