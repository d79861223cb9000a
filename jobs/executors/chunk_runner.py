"""The steps of a chunk in the process that has the model: called directly, or as a Ray actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from latentmill.engine import EngineError
from latentmill.jobs.chunk_result import ChunkResult, describe_fault, failed_result
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.postprocess import ProcessedSample
from latentmill.jobs.stages import StageClock
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.worker import (
    ChunkGenerator,
    EngineFactory,
    SampledChunk,
    commit_chunk,
    load_engine,
    postprocess_chunk,
)

T = TypeVar("T")


class ModelLoadError(JobError):
    """A model that cannot be loaded here, by its own fault or the machine's."""


class ChunkRunner:
    """One loaded model and its job. What a step raises, of whatever kind, comes back as a ChunkResult with its blame.

    `model` is the number of the plan's model. Raises ModelLoadError if it cannot be loaded, JobError if that is the
    store's fault.
    """

    def __init__(self, job: Job, *, engine_factory: EngineFactory = load_engine, model: int = 0) -> None:
        self._job = job
        try:
            self._generator = ChunkGenerator(job, engine_factory=engine_factory, model=model)
        except Exception as error:  # the model's, torch's or the store's: told once, as a job's error
            reason = str(error) if isinstance(error, JobError | EngineError) else describe_fault(error)
            which = f"the model {job.plan.models[model].source}" if len(job.plan.models) > 1 else "the model"
            kind = JobError if isinstance(error, StorageError) else ModelLoadError
            raise kind(f"{which} could not be loaded: {reason}") from error
        self.actor = self._generator.actor
        self.execution_class = self._generator.execution_class

    def sample(self, chunk: int, *, repair: bool = False) -> SampledChunk | ChunkResult:
        """The chunk's pictures, for `finish`; a result if there is nothing to do, or if they cannot be made."""
        return _told(chunk, self.actor, partial(self._generator.sample, chunk, repair=repair))

    def chunk(self, chunk: int, *, repair: bool = False) -> ChunkResult:
        """The whole chunk, from prompts to its commit."""
        sampled = self.sample(chunk, repair=repair)
        return sampled if isinstance(sampled, ChunkResult) else self.finish(sampled)

    def finish(self, sampled: SampledChunk) -> ChunkResult:
        """Check, watermark, encode, write and commit it. Threads may do so while the next chunk is sampled."""
        return _told(sampled.chunk, sampled.actor, lambda: postprocess_chunk(self._job, self._generator.check(sampled)))

    def row(self, chunk: int, row: int) -> ProcessedSample | ChunkResult:
        """One row of a chunk from prompt to file, without the others."""
        return _told(chunk, self.actor, partial(self._generator.process_row, chunk, row))

    def control(self, chunk: int) -> ChunkResult | None:
        """A batch of empty prompts of the chunk's shape; what is wrong with it, if anything."""
        return _told(chunk, self.actor, partial(self._generator.generate_control, chunk))

    def commit(self, chunk: int, samples: Sequence[ProcessedSample], repair: int) -> ChunkResult:
        """Write and commit the chunk's samples, as the repair of that number if it is not 0."""
        commit = partial(
            commit_chunk,
            self._job,
            chunk,
            samples,
            execution_class=self.execution_class,
            actor=self.actor,
            clock=StageClock(),
            repair=repair,
        )
        return _told(chunk, self.actor, commit)


def _told(chunk: int, actor: str, step: Callable[[], T]) -> T | ChunkResult:
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - the model's, the device's or the store's: the result says which
        return failed_result(chunk, error, actor)
