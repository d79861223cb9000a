"""What happens to one chunk: generate it, finish its samples, write its pictures, commit its record last."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

from engine import GenerationRequest, GenerationResult
from jobs.errors import JobError, OutputConflictError
from jobs.finishing import FinishedSample, finish_sample
from jobs.job import Job, open_job
from jobs.outputs.records import count_statuses, encode_record, tool_versions
from jobs.plans.plan import Plan


class ChunkEngine(Protocol):
    """The part of the engine that a worker uses."""

    @property
    def execution_class(self) -> str: ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]: ...


EngineFactory = Callable[[Plan, str], ChunkEngine]
"""Loads the plan's model onto a device. A module-level function: it travels to actors by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedChunk:
    """The results of one chunk, in the plan's order, on their way to be finished."""

    chunk: int
    results: list[GenerationResult]
    execution_class: str
    actor: str
    generate_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What became of one try at one chunk. It informs; the ledger decides.

    `committed`: this try's record stands. `already`: the chunk was committed before, nothing was generated.
    `lost`: another attempt committed it first. `skipped`: it was not tried, and is still open. `error`: it was tried,
    and is still open; `blame` says whether the chunk itself may be at fault, or another plan's record was met.
    """

    chunk: int
    outcome: Literal["committed", "already", "lost", "skipped", "error"]
    ok: int = 0
    flagged: int = 0
    failed: int = 0
    error: str | None = None
    blame: Literal["chunk", "conflict", "elsewhere"] = "elsewhere"
    actor: str = ""
    generate_seconds: float = 0.0
    finish_seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether the chunk is committed, by whomever."""
        return self.outcome not in {"error", "skipped"}


def fault_receipt(chunk: int, error: Exception, actor: str = "") -> Receipt:
    """The receipt of a try that ended in an exception: what a job's own errors say is not the chunk's fault."""
    if isinstance(error, OutputConflictError):
        return Receipt(chunk=chunk, outcome="error", error=str(error), blame="conflict", actor=actor)
    if isinstance(error, JobError):
        return Receipt(chunk=chunk, outcome="error", error=str(error), actor=actor)
    return Receipt(chunk=chunk, outcome="error", error=describe_fault(error), blame="chunk", actor=actor)


def describe_fault(error: BaseException) -> str:
    """An exception that is not of ours, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]


def load_engine(plan: Plan, device: str) -> ChunkEngine:
    """The plan's own model on `device` (`auto`: a GPU if there is one), at the plan's dtype, threads and batch size."""
    import torch

    from engine import Engine

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if plan.threads_per_actor:
        torch.set_num_threads(plan.threads_per_actor)
    spec = replace(
        plan.model.spec,
        safety=plan.safety,
        safety_threshold=plan.nsfw_threshold,
        prompt_syntax=plan.prompt_syntax,
        long_prompts=plan.long_prompts,
    )
    return Engine.load(spec, device=device, dtype=plan.dtype, batch_size=plan.batch_size)


class ChunkGenerator:
    """One loaded model that turns chunk numbers into pictures."""

    def __init__(self, out_url: str, *, device: str = "auto", engine_factory: EngineFactory = load_engine) -> None:
        self._job = open_job(out_url)
        self._engine = engine_factory(self._job.plan, device)
        self.actor = f"{socket.gethostname()}:{os.getpid()}"

    @property
    def execution_class(self) -> str:
        """What the bits of this generator's pictures depend on."""
        return self._engine.execution_class

    def generate(self, chunk: int) -> GeneratedChunk | Receipt:
        """The whole chunk, or a receipt if the ledger has it already: a committed chunk is never generated again."""
        record = self._job.ledger.read(chunk)
        if record is not None:
            counts = count_statuses(record.table)
            return Receipt(
                chunk=chunk,
                outcome="already",
                ok=counts["ok"],
                flagged=counts["flagged"],
                failed=counts["failed"],
                actor=self.actor,
            )
        samples = self._job.plan.samples_of_chunk(chunk)
        started = time.perf_counter()
        results = self._engine.generate([sample.request for sample in samples])
        return GeneratedChunk(
            chunk=chunk,
            results=results,
            execution_class=self._engine.execution_class,
            actor=self.actor,
            generate_seconds=time.perf_counter() - started,
        )

    def generate_rows(self, chunk: int, rows: Collection[int]) -> dict[int, GenerationResult]:
        """Only these rows of a chunk, at the batch shape and in the slots that they have in the whole chunk.

        Every other row of their batches is replaced by one of them: it is not touched, whatever is wrong with it.
        """
        requests = [sample.request for sample in self._job.plan.samples_of_chunk(chunk)]
        size = self._job.plan.batch_size
        results: dict[int, GenerationResult] = {}
        for start in range(0, len(requests), size):
            places = range(start, min(start + size, len(requests)))
            wanted = [row for row in places if row in rows]
            if wanted:
                batch = [requests[row if row in rows else wanted[0]] for row in places]
                found = self._engine.generate(batch)
                results |= {row: found[row - start] for row in wanted}
        return results

    def finish_row(self, chunk: int, row: int) -> FinishedSample:
        """One row of a chunk from prompt to file, in this process, without the others."""
        sample = self._job.plan.samples_of_chunk(chunk)[row]
        return finish_sample(self._job.plan, sample, self.generate_rows(chunk, [row])[row], self.execution_class)

    def generate_control(self, chunk: int) -> None:
        """A batch of empty prompts of the chunk's shape. If that fails, the machine is at fault and not a prompt."""
        plan = self._job.plan
        request = replace(plan.samples_of_chunk(chunk)[0].request, prompt="", negative_prompt="", seed=0)
        self._engine.generate([request] * plan.batch_size)


def finish_chunk(out_url: str, generated: GeneratedChunk) -> Receipt:
    """Afterwards the chunk is committed: by this attempt, with all its pictures durable, or by an earlier one.

    Raises StorageError if the store would not say so; the chunk then counts as open and is tried again.
    """
    started = time.perf_counter()
    plan = open_job(out_url).plan
    samples = plan.samples_of_chunk(generated.chunk)
    if len(samples) != len(generated.results):
        raise JobError(
            f"chunk {generated.chunk} has {len(samples)} samples but the engine returned {len(generated.results)}; "
            f"nothing of it is committed"
        )
    finished = [
        finish_sample(plan, sample, result, generated.execution_class)
        for sample, result in zip(samples, generated.results, strict=True)
    ]
    receipt = commit_chunk(
        out_url,
        generated.chunk,
        finished,
        execution_class=generated.execution_class,
        actor=generated.actor,
        generate_seconds=generated.generate_seconds,
    )
    return replace(receipt, finish_seconds=time.perf_counter() - started)


def commit_chunk(
    out_url: str,
    chunk: int,
    finished: Sequence[FinishedSample],
    *,
    execution_class: str,
    actor: str,
    generate_seconds: float,
) -> Receipt:
    """Write the pictures of a chunk's finished samples, then its commit record; the end of `finish_chunk`."""
    job = open_job(out_url)
    attempt = secrets.token_hex(8)
    rows = _store_pictures(job, chunk, attempt, finished)
    data = encode_record(
        rows,
        job.ledger.schema,
        chunk=chunk,
        attempt=attempt,
        plan_hash=job.plan.plan_hash,
        execution_class=execution_class,
        versions=_versions(),
        details={"actor": actor, "generate_seconds": f"{generate_seconds:.3f}"},
    )
    outcome = job.ledger.commit(chunk, attempt, data)
    counts = Counter(row["status"] for row in rows)
    return Receipt(
        chunk=chunk,
        outcome="committed" if outcome == "mine" else "lost",
        actor=actor,
        generate_seconds=generate_seconds,
        ok=counts["ok"],
        flagged=counts["flagged"],
        failed=counts["failed"],
    )


def _store_pictures(job: Job, chunk: int, attempt: str, finished: Sequence[FinishedSample]) -> list[dict[str, Any]]:
    images = [(item.row["sample_id"], item.data) for item in finished if item.data is not None]
    stored = job.sink.write(chunk, attempt, images)
    rows = []
    for item in finished:
        image = stored.get(item.row["sample_id"])
        place = {} if image is None else {"image": image.path, "bytes": image.size, "sha256": image.sha256}
        rows.append(item.row | place)
    return rows


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return tool_versions()
