"""The driver's side of an isolated worker on the cluster: its process is replaced whenever it breaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentmill.jobs.chunk_result import ChunkResult, describe_fault
from latentmill.jobs.code import own_code
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.isolation import DIED, OVERRAN
from latentmill.jobs.executors.ray_entry import WorkerProcess
from latentmill.jobs.executors.ray_pool import GRACE_SECONDS
from latentmill.jobs.postprocess import ProcessedSample

STARTS = 3
"""Starts of the process that may fail before its model is loaded."""

START_SECONDS = 1800.0
"""What loading the model may take."""


class RayIsolatedWorker:
    """An `IsolatedWorker` of isolation.py: a Ray actor that is started with `options` when there is none.

    `seconds` says what a chunk may take, `model_of` which model it needs; `on_death` hears on which node the process
    died, or was ended. Raises JobError if no process with the model can be started.
    """

    def __init__(
        self,
        arguments: bytes,
        *,
        options: Mapping[str, Any],
        seconds: Callable[[int], float],
        model_of: Callable[[int], int],
        on_death: Callable[[str], None],
    ) -> None:
        self._arguments = arguments
        self._model_of = model_of
        self._model = -1
        self._options = options
        self._seconds = seconds
        self._on_death = on_death
        self._actor: Any = None
        self._node = ""
        self.execution_class = ""
        """That of the process, asked when it was started."""

    def chunk(self, chunk: int, *, repair: bool) -> ChunkResult:
        """The whole chunk."""
        result: ChunkResult = self._call("chunk", self._seconds(chunk), chunk, repair=repair)
        return result

    def row(self, chunk: int, row: int) -> ProcessedSample | ChunkResult:
        """One row from prompt to file."""
        sample: ProcessedSample | ChunkResult = self._call("row", self._seconds(chunk), chunk, row)
        return sample

    def control(self, chunk: int) -> ChunkResult | None:
        """A batch of empty prompts."""
        fault: ChunkResult | None = self._call("control", self._seconds(chunk), chunk)
        return fault

    def commit(self, chunk: int, samples: Sequence[ProcessedSample], repair: int) -> ChunkResult:
        """The chunk's samples, committed."""
        result: ChunkResult = self._call("commit", START_SECONDS, chunk, samples, repair)
        return result

    def close(self) -> None:
        """End the process."""
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None

    def _call(self, verb: str, seconds: float, chunk: int, *arguments: Any, **options: Any) -> Any:
        import ray

        actor = self._started(self._model_of(chunk))
        began = time.monotonic()
        try:
            call = actor.alone.remote(verb, seconds, chunk, *arguments, **options)
            return ray.get(call, timeout=seconds + GRACE_SECONDS)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError):
            self.close()
            self._on_death(self._node)
            error = OVERRAN if time.monotonic() - began >= seconds else DIED
            return ChunkResult(chunk=chunk, outcome="error", error=error, blame="chunk")

    def _started(self, model: int) -> Any:
        import ray

        if self._actor is not None and self._model == model:
            return self._actor
        self.close()
        reason: str | None = ""
        for _ in range(STARTS):
            actor = ray.remote(WorkerProcess).options(max_restarts=0, **self._options).remote(own_code())
            try:
                load = actor.load.remote(self._arguments, model)
                self._node = ray.get(actor.node.remote(), timeout=START_SECONDS)
                reason, self.execution_class, _ = ray.get(load, timeout=START_SECONDS)
            except ray.exceptions.RayError as error:
                reason = describe_fault(error)
            if reason is None:
                self._actor, self._model = actor, model
                return actor
            ray.kill(actor)
        raise JobError(f"an isolated worker could not be started {STARTS} times: {reason}; run the same command again")
