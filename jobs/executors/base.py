"""What every executor does: run a job's chunks, in any order, and hand back one result for each try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Protocol

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.executor_table import EXECUTORS
from latentmill.jobs.job import Job
from latentmill.jobs.spec import Runtime
from latentmill.jobs.worker import EngineFactory


class Executor(Protocol):
    """Somewhere to run chunks. It may drop or repeat chunks: the ledger decides what is done, the caller replans."""

    def run(self, chunks: Sequence[int], *, repair: bool = False) -> Iterator[ChunkResult]:
        """Run the chunks; a `repair` makes the failed rows of committed chunks again.

        A chunk that breaks its worker is isolated: sooner or later it is committed, with only the culprits failed.
        Closing the iterator early starts no more chunks; whether those in flight are finished is the executor's matter.
        """

    def stop(self) -> bool:
        """Start no more chunks; `run` then ends once those in flight are done. False if there is none in flight.

        It may be called from a signal's handler.
        """

    def describe(self) -> str:
        """Where the work runs, in a few words."""

    def live_actors(self) -> int:
        """How many models are loaded and at work."""

    def left_out(self) -> Sequence[str]:
        """What could not take part, and why: one line for each such node."""

    def close(self) -> None:
        """Give everything back."""


def open_executor(job: Job, runtime: Runtime, engine_factory: EngineFactory) -> Executor:
    """The executor that the job's settings name, connected and ready to run chunks."""
    module, _, name = EXECUTORS[runtime.executor].factory.partition(":")
    executor: Executor = getattr(import_module(module), name)(job, runtime, engine_factory=engine_factory)
    return executor
