"""Our own part of the work in the processes that Ray starts: generating chunks, postprocessing them, isolated ones."""

from __future__ import annotations

import os
import pickle
import socket
from functools import lru_cache
from typing import Any

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.code import Code, own_code
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.chunk_runner import ChunkRunner, postprocess
from latentmill.jobs.executors.deadline import deadline
from latentmill.jobs.executors.worker_registry import UNKNOWN_SECONDS
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.worker import EngineFactory, GeneratedChunk


@lru_cache(maxsize=1)
def job_of_this_process(out_url: str, plan_hash: str) -> Job:
    """The driver's job, opened once in each process. Raises JobError if the output has another plan by now."""
    job = open_job(out_url)
    if job.plan.plan_hash != plan_hash:
        raise JobError(f"{job.storage.url} has another plan than when this run began; run the same command again")
    return job


class PooledWorker:
    """What is inside an actor of the pool, with its model loaded; the actor itself is in ray_entry.py."""

    def __init__(
        self, name: str, registry: Any, place: tuple[str, str], engine_factory: EngineFactory, repair: bool
    ) -> None:
        self._name = name
        self._registry = registry
        self._repair = repair
        self._grid = job_of_this_process(*place).plan.grid
        self._runner = ChunkRunner(job_of_this_process(*place), engine_factory=engine_factory)

    def generate(self, chunk: int) -> bytes:
        """A generated chunk for `postprocess_payload`, or a result. Nothing is raised: Ray would drop the block."""
        return pickle.dumps(self._generate(chunk), protocol=5)

    def _generate(self, chunk: int) -> GeneratedChunk | ChunkResult:
        import ray

        group, start, stop = self._grid.group_of(chunk)
        try:
            seconds = ray.get(self._registry.begin.remote(self._name, chunk, group.first_chunk, stop - start))
        except ray.exceptions.RayError:  # the registry is only advice
            seconds = (stop - start) * UNKNOWN_SECONDS
        if seconds is None:
            return ChunkResult(chunk=chunk, outcome="skipped", actor=self._runner.actor)
        with deadline(seconds):
            made = self._runner.generate(chunk, repair=self._repair)
        _end_on_lost_device(made)
        if isinstance(made, ChunkResult) and made.outcome == "error":
            self._registry.left.remote(self._name, made.error if made.blame == "chunk" else None)
        else:
            self._registry.done.remote(self._name, group.first_chunk)
        return made


def postprocess_payload(payload: Any, registry: Any, place: tuple[str, str]) -> bytes:
    """The result of a generated chunk, postprocessed and committed; or the one that came in its place."""
    made: GeneratedChunk | ChunkResult = pickle.loads(payload)  # noqa: S301 - from our own actors
    if isinstance(made, GeneratedChunk):
        made = postprocess(job_of_this_process(*place), made)
        if made.blame == "chunk":
            registry.blame.remote(made.chunk)
    return pickle.dumps(made, protocol=5)


class IsolatedProcess:
    """A ChunkRunner as an actor with nothing of the job beside it; the driver's side of it is in ray_isolated.py."""

    def __init__(self, code: Code, place: tuple[str, str], engine_factory: EngineFactory) -> None:
        if own_code().digest != code.digest:
            raise JobError(f"{socket.gethostname()} has {own_code()}, but this command runs {code}")
        self._runner = ChunkRunner(job_of_this_process(*place), engine_factory=engine_factory)

    def execution_class(self) -> str:
        """Answers once the model is loaded."""
        return self._runner.execution_class

    def call(self, verb: str, seconds: float, *arguments: Any, **options: Any) -> Any:
        """One verb of the runner, within so many seconds or not at all."""
        with deadline(seconds):
            outcome = getattr(self._runner, verb)(*arguments, **options)
        _end_on_lost_device(outcome)
        return outcome


def _end_on_lost_device(outcome: Any) -> None:
    """After one CUDA error every call of the process fails: the next try needs a fresh one, which Ray starts."""
    if isinstance(outcome, ChunkResult) and "CUDA error" in (outcome.error or ""):
        os._exit(1)
