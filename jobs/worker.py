"""What happens to one chunk: generate it, postprocess its samples, write its pictures, commit its record last."""

from __future__ import annotations

import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from latentmill.engine import GenerationRequest, GenerationResult, UncheckedResult
from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.code import own_code
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.records import encode_record, tool_versions
from latentmill.jobs.models.place import place_model
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.plan import Plan, PlannedSample
from latentmill.jobs.postprocess import ProcessedSample, failed_sample, postprocess_sample
from latentmill.jobs.reuse import NOTHING_TAKEN, CellIndex, TakenCells
from latentmill.jobs.slots import draw_in_slots, slot_batches, slots_of
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.stages import StageClock


class ChunkEngine(Protocol):
    """The part of the engine that a worker uses."""

    @property
    def execution_class(self) -> str: ...

    def sample(self, requests: Sequence[GenerationRequest]) -> list[UncheckedResult]: ...
    def check(self, sampled: Sequence[UncheckedResult]) -> list[GenerationResult]: ...
    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]: ...


EngineFactory = Callable[[Plan, str], ChunkEngine]
"""Loads the plan's model onto a device. A module-level function: it travels to actors by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledChunk:
    """The pictures of one chunk that no checker has judged yet, in the plan's order.

    `rows` are their places within the chunk: all that no donor had, or for a repair (numbered from 1) those that had
    failed. What donors had is in `taken`.
    """

    chunk: int
    rows: Sequence[int]
    sampled: list[UncheckedResult]
    execution_class: str
    actor: str
    clock: StageClock
    repair: int = 0
    taken: TakenCells = NOTHING_TAKEN


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedChunk:
    """The results of one chunk, in the plan's order, on their way to be postprocessed. `rows` as above."""

    chunk: int
    rows: Sequence[int]
    results: list[GenerationResult]
    execution_class: str
    actor: str
    clock: StageClock
    repair: int = 0
    taken: TakenCells = NOTHING_TAKEN


def load_engine(plan: Plan, device: str) -> ChunkEngine:
    """The plan's own model on `device` (`auto`: a GPU if there is one), at the plan's dtype, threads and batch size."""
    return load_model(plan.model, plan.settings, plan.batch_size, device, merged=plan.merged_loras)


def load_model(
    model: ResolvedModel,
    settings: JobSpec,
    batch_size: int,
    device: str,
    *,
    merged: Mapping[str, float] | None = None,
) -> ChunkEngine:
    """The model as a job with these settings runs it. LoRAs that are `merged` count so much in every sample."""
    import torch

    from latentmill.engine import Engine

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.threads_per_actor:
        torch.set_num_threads(settings.threads_per_actor)
    placed = place_model(model)
    spec = replace(
        placed,
        loras=tuple(replace(lora, merged=(merged or {}).get(lora.name)) for lora in placed.loras),
        safety=settings.safety,
        safety_threshold=settings.nsfw_threshold,
        prompt_syntax=settings.prompt_syntax,
        long_prompts=settings.long_prompts,
    )
    return Engine.load(spec, device=device, dtype=settings.dtype, batch_size=batch_size, execution=settings.execution)


class ChunkGenerator:
    """One loaded model that turns numbers of its chunks into pictures."""

    def __init__(self, job: Job, *, engine_factory: EngineFactory = load_engine, model: int = 0) -> None:
        self._job = job
        plan, donors = job.plan.of_model(model), job.reuse.donors
        self._clock = StageClock()  # of the next chunk: the first one's has the loading
        with self._clock.time("load"):
            self._engine = engine_factory(plan, plan.settings.device)
        self._cells = CellIndex(plan, donors, self._engine.execution_class) if donors else None
        self.actor = f"{socket.gethostname()}:{os.getpid()}"

    @property
    def execution_class(self) -> str:
        """What the bits of this generator's pictures depend on."""
        return self._engine.execution_class

    def generate(self, chunk: int, *, repair: bool = False) -> GeneratedChunk | ChunkResult:
        """`sample`, then `check`."""
        sampled = self.sample(chunk, repair=repair)
        return sampled if isinstance(sampled, ChunkResult) else self.check(sampled)

    def check(self, chunk: SampledChunk) -> GeneratedChunk:
        """The chunk with the checker's verdicts. May run in any thread, also while the next chunk is sampled."""
        with chunk.clock.time("check"):
            results = self._engine.check(chunk.sampled)
        return GeneratedChunk(
            chunk=chunk.chunk,
            rows=chunk.rows,
            results=results,
            execution_class=chunk.execution_class,
            actor=chunk.actor,
            clock=chunk.clock,
            repair=chunk.repair,
            taken=chunk.taken,
        )

    def sample(self, chunk: int, *, repair: bool = False) -> SampledChunk | ChunkResult:
        """The whole chunk, or a result if the ledger has it already: a committed chunk is never generated again.

        A `repair` makes the rows of a committed chunk again that failed and are not repaired yet, if there are any.
        """
        record = self._job.ledger.effective(chunk) if repair else self._job.ledger.read(chunk)
        rows = record.failed() if repair and record is not None else ()
        if record is not None and not rows:
            counts = record.counts()
            return ChunkResult(
                chunk=chunk,
                outcome="already",
                ok=counts["ok"],
                flagged=counts["flagged"],
                failed=counts["failed"],
                actor=self.actor,
            )
        clock, self._clock, taken = self._clock, StageClock(), NOTHING_TAKEN
        if record is None:
            samples = self._job.plan.samples_of_chunk(chunk)
            if self._cells is not None:
                with clock.time("reuse"):
                    taken = self._cells.take(samples)
            with clock.time("sample"):
                rows, sampled = self._sample_rest(samples, taken)
        else:
            with clock.time("sample"):
                sampled = list(self._sample_rows(chunk, rows).values())
        return SampledChunk(
            chunk=chunk,
            rows=rows,
            sampled=sampled,
            execution_class=self._engine.execution_class,
            actor=self.actor,
            clock=clock,
            repair=0 if record is None else record.repairs + 1,
            taken=taken,
        )

    def _sample_rest(
        self, samples: Sequence[PlannedSample], taken: TakenCells
    ) -> tuple[tuple[int, ...], list[UncheckedResult]]:
        """What donors did not have, in as few batches as it takes.

        A row's bits do not depend on its slot; each has the one here that it has when the whole chunk is drawn.
        """
        requests = [sample.request for sample in samples]
        rows = tuple(row for row in range(len(samples)) if row not in taken.samples)
        sampled = self._engine.sample([requests[row] for row in rows]) if rows else []
        if len(rows) < len(samples):
            slots = slots_of(requests, self._job.plan.batch_size)
            sampled = [replace(found, batch_slot=slots[row]) for row, found in zip(rows, sampled, strict=True)]
        return rows, sampled

    def _sample_rows(self, chunk: int, rows: Sequence[int]) -> dict[int, UncheckedResult]:
        """Only these rows of a chunk, at the batch shape and in the slots that they have when the whole chunk is made.

        Every other slot has one of them too: other rows are not touched, whatever is wrong with them.
        """
        batch_size = self._job.plan.batch_size
        requests = [sample.request for sample in self._job.plan.samples_of_chunk(chunk)]
        slots = slots_of(requests, batch_size)
        sampled: dict[int, UncheckedResult] = {}
        for batch, places in slot_batches(requests, {row: slots[row] for row in rows}, batch_size):
            found = self._engine.sample(batch)
            sampled |= {row: found[slot] for slot, row in places.items()}
        return {row: sampled[row] for row in rows}

    def generate_in_slots(
        self, chunk: int, slots: Mapping[int, int]
    ) -> Iterator[tuple[int, Iterator[GenerationResult]]]:
        """Rows of a committed chunk once more, each in that slot of a batch that it had, as `draw_in_slots` says."""
        requests = [sample.request for sample in self._job.plan.samples_of_chunk(chunk)]
        return draw_in_slots(self._engine, requests, slots, self._job.plan.batch_size)

    def process_row(self, chunk: int, row: int) -> ProcessedSample:
        """One row of a chunk from prompt to file, in this process, without the others."""
        sample = self._job.plan.samples_of_chunk(chunk)[row]
        (result,) = self._engine.check([self._sample_rows(chunk, [row])[row]])
        return postprocess_sample(self._job.plan, sample, result, self.execution_class)

    def generate_control(self, chunk: int) -> None:
        """A batch of empty prompts of the chunk's shape. If that fails, the machine is at fault and not a prompt."""
        plan = self._job.plan
        request = replace(plan.samples_of_chunk(chunk)[0].request, prompt="", negative_prompt="", seed=0)
        self._engine.generate([request] * plan.batch_size)


def postprocess_chunk(job: Job, generated: GeneratedChunk) -> ChunkResult:
    """Afterwards the chunk is committed: by this attempt, with all its pictures durable, or by an earlier one.

    Raises StorageError if the store would not say so; the chunk then counts as open and is tried again.
    """
    samples = job.plan.samples_of_chunk(generated.chunk)
    if len(generated.rows) != len(generated.results):
        raise JobError(
            f"chunk {generated.chunk} has {len(generated.rows)} samples but the engine returned "
            f"{len(generated.results)}; nothing of it is committed"
        )
    processed = dict(generated.taken.samples)
    with generated.clock.time("encode"):
        for row, result in zip(generated.rows, generated.results, strict=True):
            processed[row] = postprocess_sample(job.plan, samples[row], result, generated.execution_class)
    committed = commit_chunk(
        job,
        generated.chunk,
        [processed[row] for row in sorted(processed)],
        execution_class=generated.execution_class,
        actor=generated.actor,
        clock=generated.clock,
        repair=generated.repair,
    )
    return replace(committed, reused=len(generated.taken.samples), notes=generated.taken.notes)


def commit_unmade(job: Job, chunk: int, reason: str, *, repair: bool) -> ChunkResult:
    """Afterwards the chunk is committed, all its samples failed for this reason: its model cannot be loaded.

    A `repair` writes nothing: its rows have failed before.
    """
    if repair:
        return ChunkResult(chunk=chunk, outcome="unrepaired")
    samples = enumerate(job.plan.samples_of_chunk(chunk))
    size = job.plan.batch_size
    processed = [failed_sample(job.plan, sample, row % size, reason, None) for row, sample in samples]
    return commit_chunk(job, chunk, processed, execution_class="none", actor="", clock=StageClock())


def commit_chunk(
    job: Job,
    chunk: int,
    processed: Sequence[ProcessedSample],
    *,
    execution_class: str,
    actor: str,
    clock: StageClock,
    repair: int = 0,
) -> ChunkResult:
    """Write the pictures of a chunk's samples, then its commit record, or the repair record of that number.

    A repair record holds what does not fail any more; where everything fails again, nothing is written.
    """
    counts = Counter(item.row["status"] for item in processed)
    result = ChunkResult(
        chunk=chunk,
        outcome="unrepaired",
        actor=actor,
        stages=clock.seconds,  # the very dictionary: what follows counts too
        ok=counts["ok"],
        flagged=counts["flagged"],
        failed=counts["failed"],
    )
    if repair:
        processed = [item for item in processed if item.row["status"] != "failed"]
        if not processed:
            return result
    attempt = secrets.token_hex(8)
    with clock.time("write"):
        rows = _store_pictures(job, chunk, attempt, repair, processed)
    with clock.time("commit"):
        data = encode_record(
            rows,
            job.ledger.schema,
            chunk=chunk,
            attempt=attempt,
            plan_hash=job.plan.plan_hash,
            execution_class=execution_class,
            versions=_versions(),
            details={
                **{name.removeprefix("latentmill."): text for name, text in job.plan.file_metadata.items()},
                "actor": actor,
                **clock.details(),
            },
            repair=repair,
        )
        if repair:
            outcome = job.ledger.commit_repair(chunk, repair, attempt, data)
        else:
            outcome = job.ledger.commit(chunk, attempt, data)
    return replace(result, outcome="committed" if outcome == "mine" else "lost")


def _store_pictures(
    job: Job, chunk: int, attempt: str, repair: int, processed: Sequence[ProcessedSample]
) -> list[dict[str, Any]]:
    images = [(item.row["sample_id"], item.data) for item in processed if item.data is not None]
    origins = {item.row["sample_id"]: item.origin for item in processed if item.origin is not None}
    stored = job.pictures.write(chunk, attempt, images, repair, origins if job.reuse.link else {})
    rows = []
    for item in processed:
        image = stored.get(item.row["sample_id"])
        place = {} if image is None else {"image": image.path, "bytes": image.size, "sha256": image.sha256}
        rows.append(item.row | place)
    return rows


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return tool_versions() | {"code": own_code().digest}
