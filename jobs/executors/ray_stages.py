"""The two stages of a pass on the cluster, as they are in a worker: generating a chunk, and finishing it."""

from __future__ import annotations

import os
import pickle
from typing import Any

from latentmill.engine import EngineError
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.deadline import deadline
from latentmill.jobs.executors.roster import UNKNOWN_SECONDS
from latentmill.jobs.worker import (
    ChunkGenerator,
    EngineFactory,
    GeneratedChunk,
    Receipt,
    describe_fault,
    fault_receipt,
    finish_chunk,
)


class Generator:
    """What is inside an actor, with its model loaded; the actor itself is in ray_entry.py."""

    def __init__(
        self, worker: str, roster: Any, out_url: str, device: str, engine_factory: EngineFactory, repair: bool
    ) -> None:
        self._name = worker
        self._roster = roster
        self._repair = repair
        try:
            self._generator = ChunkGenerator(out_url, device=device, engine_factory=engine_factory)
        except Exception as error:
            reason = str(error) if isinstance(error, JobError | EngineError) else describe_fault(error)
            raise JobError(f"the model could not be loaded: {reason}") from error

    def generate(self, chunk: int) -> bytes:
        """A generated chunk for `finish`, or a receipt. No exception leaves it: Ray would drop the block in silence."""
        return pickle.dumps(self._generate(chunk), protocol=5)

    def _generate(self, chunk: int) -> GeneratedChunk | Receipt:
        import ray

        generator = self._generator
        try:
            group, samples = generator.cut(chunk)
            try:
                seconds = ray.get(self._roster.begin.remote(self._name, chunk, group, samples))
            except ray.exceptions.RayError:  # the roster is only advice
                seconds = samples * UNKNOWN_SECONDS
            if seconds is None:
                return Receipt(chunk=chunk, outcome="skipped", actor=generator.actor)
            with deadline(seconds):
                made = generator.generate(chunk, repair=self._repair)
        except Exception as error:  # noqa: BLE001 - see `generate`
            if "CUDA error" in str(error):
                os._exit(1)  # after one such error every call fails; Ray starts a fresh process and tries again
            receipt = fault_receipt(chunk, error, generator.actor)
            fault = receipt.error if receipt.blame == "chunk" else None
            self._roster.left.remote(self._name, fault)
            return receipt
        self._roster.done.remote(self._name, group)
        return made


def finish(payload: Any, roster: Any, out_url: str) -> bytes:
    """Watermark, encode, write and commit one chunk; its receipt, or the one that came in its place."""
    generated: GeneratedChunk | Receipt = pickle.loads(payload)  # noqa: S301 - from our own actors
    receipt = generated if isinstance(generated, Receipt) else _finish(generated, roster, out_url)
    return pickle.dumps(receipt, protocol=5)


def _finish(generated: GeneratedChunk, roster: Any, out_url: str) -> Receipt:
    try:
        return finish_chunk(out_url, generated)
    except Exception as error:  # noqa: BLE001 - Ray would drop the block in silence; the receipt says what happened
        receipt = fault_receipt(generated.chunk, error, generated.actor)
        if receipt.blame == "chunk":
            roster.blame.remote(generated.chunk)
        return receipt
