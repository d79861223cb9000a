"""Our own part of the work in the processes that Ray starts; the actor around it is in ray_entry.py."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.chunk_runner import ChunkRunner
from latentmill.jobs.executors.deadline import deadline
from latentmill.jobs.job import Job, Reuse, open_job
from latentmill.jobs.worker import EngineFactory, SampledChunk


@lru_cache(maxsize=1)
def job_of_this_process(out_url: str, plan_hash: str, reuse: Reuse) -> Job:
    """The driver's job, opened once in each process. Raises JobError if the output has another plan by now."""
    job = open_job(out_url)
    if job.plan.plan_hash != plan_hash:
        raise JobError(f"{job.storage.url} has another plan than when this run began; run the same command again")
    return replace(job, reuse=reuse)


class Worker:
    """A ChunkRunner whose chunks are finished by other threads while the next one is sampled."""

    def __init__(self, place: tuple[str, str, Reuse], engine_factory: EngineFactory, model: int) -> None:
        self._runner = ChunkRunner(job_of_this_process(*place), engine_factory=engine_factory, model=model)
        self._sampled: dict[int, SampledChunk] = {}
        self._stopped = False

    @property
    def execution_class(self) -> str:
        """What the bits of its pictures depend on."""
        return self._runner.execution_class

    def sample(self, chunk: int, seconds: float, *, repair: bool) -> ChunkResult | None:
        """Within so many seconds or not at all. None: the pictures are here, for `finish`."""
        if self._stopped:
            return ChunkResult(chunk=chunk, outcome="skipped", actor=self._runner.actor)
        with deadline(seconds):
            made = self._runner.sample(chunk, repair=repair)
        _end_on_lost_device(made)
        if isinstance(made, ChunkResult):
            return made
        self._sampled[chunk] = made
        return None

    def finish(self, chunk: int) -> ChunkResult:
        """Check, postprocess and commit a chunk that was sampled."""
        return self._runner.finish(self._sampled.pop(chunk))

    def alone(self, verb: str, seconds: float, *arguments: Any, **options: Any) -> Any:
        """One verb of the runner, with nothing beside it."""
        with deadline(seconds):
            outcome = getattr(self._runner, verb)(*arguments, **options)
        _end_on_lost_device(outcome)
        return outcome

    def stop(self) -> None:
        """No chunk is begun from now on."""
        self._stopped = True


def _end_on_lost_device(outcome: Any) -> None:
    """After one CUDA error every call of the process fails: the next try needs a fresh one, which the driver starts."""
    if isinstance(outcome, ChunkResult) and "CUDA error" in (outcome.error or ""):
        os._exit(1)
