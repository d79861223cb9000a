"""One worker process of its own on the cluster, with nothing of the job beside it: replaced whenever it breaks."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from latentmill.jobs.code import Code, own_code
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.deadline import deadline
from latentmill.jobs.executors.isolation import DIED, OVERRAN, TroubleError
from latentmill.jobs.finishing import FinishedSample
from latentmill.jobs.worker import (
    ChunkGenerator,
    EngineFactory,
    Receipt,
    commit_chunk,
    describe_fault,
    fault_receipt,
    finish_chunk,
)

STARTS = 3
"""Starts of the process that may fail before its model is loaded."""

START_SECONDS = 1800.0
"""What loading the model may take."""

GRACE_SECONDS = 30.0
"""After its deadline a process ends itself; one that is stopped or out of reach is killed so much later."""


class RayCell:
    """A `Cell` of isolation.py: a Ray actor that is started with `options` when there is none."""

    def __init__(
        self,
        code: Code,
        out_url: str,
        device: str,
        engine_factory: EngineFactory,
        *,
        repair: bool,
        options: dict[str, Any],
        seconds: Callable[[int], float],
    ) -> None:
        self._arguments = (code, out_url, device, engine_factory, repair)
        self._options = options
        self._seconds = seconds
        self._actor: Any = None
        self._execution_class = ""

    @property
    def execution_class(self) -> str:
        """That of the model's process, asked when it was started."""
        return self._execution_class

    def chunk(self, chunk: int) -> Receipt:
        """The whole chunk. Raises TroubleError where it may be at fault itself."""
        receipt: Receipt = self._call("chunk", chunk, seconds=self._seconds(chunk))
        if receipt.blame == "chunk":
            raise TroubleError(receipt.error)
        return receipt

    def row(self, chunk: int, row: int) -> FinishedSample:
        """One row from prompt to file."""
        finished: FinishedSample = self._call("row", chunk, row, seconds=self._seconds(chunk))
        return finished

    def control(self, chunk: int) -> None:
        """A batch of empty prompts."""
        self._call("control", chunk, seconds=self._seconds(chunk))

    def commit(self, chunk: int, finished: Sequence[FinishedSample], repair: int) -> Receipt:
        """The chunk's finished rows, committed."""
        receipt: Receipt = self._call("commit", chunk, pickle.dumps(finished), repair, seconds=START_SECONDS)
        return receipt

    def close(self) -> None:
        """End the process."""
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None

    def _call(self, verb: str, *arguments: Any, seconds: float) -> Any:
        import ray

        actor = self._started()
        began = time.monotonic()
        try:
            kind, value = ray.get(actor.call.remote(verb, seconds, *arguments), timeout=seconds + GRACE_SECONDS)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError):
            self.close()
            raise TroubleError(OVERRAN if time.monotonic() - began >= seconds else DIED) from None
        if kind == "trouble":
            raise TroubleError(value)
        if kind == "job-error":
            raise JobError(value)
        return value

    def _started(self) -> Any:
        import ray

        last = ""
        for _ in range(STARTS if self._actor is None else 0):
            actor = ray.remote(LoneWorker).options(max_restarts=0, **self._options).remote(*self._arguments)
            try:
                self._execution_class = ray.get(actor.execution_class.remote(), timeout=START_SECONDS)
            except ray.exceptions.RayError as error:
                last = describe_fault(error)
                ray.kill(actor)
            else:
                self._actor = actor
                break
        if self._actor is None:
            raise JobError(f"a lone worker could not be started {STARTS} times: {last}; run the same command again")
        return self._actor


class LoneWorker:
    """The process behind a RayCell. Every call comes back as `(kind, value)`, for an exception would lose its words."""

    def __init__(self, code: Code, out_url: str, device: str, engine_factory: EngineFactory, repair: bool) -> None:
        if own_code().digest != code.digest:
            raise JobError(f"{socket.gethostname()} has {own_code()}, but this command runs {code}")
        self._out_url = out_url
        self._repair = repair
        self._generator = ChunkGenerator(out_url, device=device, engine_factory=engine_factory)

    def execution_class(self) -> str:
        """Answers once the model is loaded."""
        return self._generator.execution_class

    def call(self, verb: str, seconds: float, *arguments: Any) -> tuple[str, Any]:
        """One of the methods below, within so many seconds or not at all."""
        try:
            with deadline(seconds):
                return "value", getattr(self, f"_{verb}")(*arguments)
        except JobError as error:
            return "job-error", str(error)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is told to the one who asked
            if "CUDA error" in str(error):
                os._exit(1)  # after one such error every call fails: the next try needs a fresh process
            return "trouble", describe_fault(error)

    def _chunk(self, chunk: int) -> Receipt:
        try:
            generated = self._generator.generate(chunk, repair=self._repair)
            return generated if isinstance(generated, Receipt) else finish_chunk(self._out_url, generated)
        except JobError as error:
            return fault_receipt(chunk, error, self._generator.actor)

    def _row(self, chunk: int, row: int) -> FinishedSample:
        return self._generator.finish_row(chunk, row)

    def _control(self, chunk: int) -> None:
        self._generator.generate_control(chunk)

    def _commit(self, chunk: int, finished: bytes, repair: int) -> Receipt:
        try:
            return commit_chunk(
                self._out_url,
                chunk,
                pickle.loads(finished),  # noqa: S301 - from our own driver
                execution_class=self._generator.execution_class,
                actor=self._generator.actor,
                generate_seconds=0.0,
                repair=repair,
            )
        except JobError as error:
            return fault_receipt(chunk, error, self._generator.actor)
