"""The two stages of a pass on the cluster: actors that generate chunks, tasks that finish and commit them."""

from __future__ import annotations

import os
import pickle
import socket
import time
from typing import Any

import pyarrow as pa

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


class Generate:
    """An actor: one model, loaded once. No exception leaves it, for Ray would drop the whole block in silence."""

    def __init__(self, out_url: str, device: str, engine_factory: EngineFactory, roster: Any, repair: bool) -> None:
        import ray

        context = ray.get_runtime_context()
        self._name: str = context.get_actor_id()
        self._roster = roster
        self._repair = repair
        self._generator: ChunkGenerator | None = None
        if not ray.get(roster.enter.remote(self._name, context.get_node_id(), context.current_actor)):
            return
        try:
            self._generator = ChunkGenerator(out_url, device=device, engine_factory=engine_factory)
        except Exception as error:  # noqa: BLE001 - an actor that dies in its constructor is restarted for ever
            reason = str(error) if isinstance(error, JobError | EngineError) else describe_fault(error)
            roster.unfit.remote(self._name, f"on {socket.gethostname()} the model could not be loaded: {reason}")
        else:
            roster.ready.remote(self._name)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _packed(self._generate(int(batch["chunk"][0].as_py())))

    def _generate(self, chunk: int) -> GeneratedChunk | Receipt:
        import ray

        generator = self._generator
        if generator is None:
            time.sleep(1.0)  # so that a broken node does not swallow the chunks of the sound ones
            return Receipt(chunk=chunk, outcome="skipped")
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
        except Exception as error:  # noqa: BLE001 - see the class
            if "CUDA error" in str(error):
                os._exit(1)  # after one such error every call fails; Ray starts a fresh process and tries again
            receipt = fault_receipt(chunk, error, generator.actor)
            fault = receipt.error if receipt.blame == "chunk" else None
            self._roster.left.remote(self._name, fault)
            return receipt
        self._roster.done.remote(self._name, group)
        return made


def finish(batch: pa.Table, out_url: str, roster: Any) -> pa.Table:
    """Watermark, encode, write and commit one chunk; a receipt passes through."""
    generated = unpacked(batch["payload"][0])
    if isinstance(generated, Receipt):
        return _packed(generated)
    try:
        return _packed(finish_chunk(out_url, generated))
    except Exception as error:  # noqa: BLE001 - Ray would drop the block in silence; the receipt says what happened
        receipt = fault_receipt(generated.chunk, error, generated.actor)
        if receipt.blame == "chunk":
            roster.blame.remote(generated.chunk)
        return _packed(receipt)


def _packed(item: GeneratedChunk | Receipt) -> pa.Table:
    """One row with one binary cell, so that no block boundary can ever run through a chunk."""
    return pa.table({"payload": pa.array([pickle.dumps(item, protocol=5)], pa.large_binary())})


def unpacked(cell: Any) -> GeneratedChunk | Receipt:
    """What `_packed` put into a cell."""
    item: GeneratedChunk | Receipt = pickle.loads(cell.as_buffer())  # noqa: S301 - from our own actors and tasks
    return item
