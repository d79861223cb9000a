"""What happens to one chunk: generate it, apply the policies, write its pictures, commit its record last."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

from engine import GenerationRequest, GenerationResult
from engine.types import Pixels
from jobs.errors import JobError
from jobs.job import Job, open_job
from jobs.manifests.parameters import parameters_text
from jobs.mark_bits import bits_needed, matching_bits
from jobs.outputs.images import blank, encode_png, pixel_sha256
from jobs.outputs.records import encode_record, tool_versions
from jobs.plans.plan import Plan, PlannedSample

RETRY_METHOD = "dwtDctSvd"
"""What the policy `retry` marks with where the plan's own mark cannot be read back: it holds on smooth pictures."""

_ERROR_LIMIT = 1000


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
    `lost`: another attempt committed it first. `error`: the chunk is still open.
    """

    chunk: int
    outcome: Literal["committed", "already", "lost", "error"]
    ok: int = 0
    flagged: int = 0
    failed: int = 0
    error: str | None = None
    actor: str = ""
    generate_seconds: float = 0.0
    finish_seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether the chunk is committed, by whomever."""
        return self.outcome != "error"


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
            counts = record.counts()
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


def finish_chunk(out_url: str, generated: GeneratedChunk) -> Receipt:
    """Afterwards the chunk is committed: by this attempt, with all its pictures durable, or by an earlier one.

    Raises StorageError if the store would not say so; the chunk then counts as open and is tried again.
    """
    started = time.perf_counter()
    job = open_job(out_url)
    samples = job.plan.samples_of_chunk(generated.chunk)
    if len(samples) != len(generated.results):
        raise JobError(
            f"chunk {generated.chunk} has {len(samples)} samples but the engine returned {len(generated.results)}; "
            f"nothing of it is committed"
        )
    attempt = secrets.token_hex(8)
    finished = [
        _finish_sample(job.plan, sample, result, generated.execution_class)
        for sample, result in zip(samples, generated.results, strict=True)
    ]
    rows = _store_pictures(job, generated.chunk, attempt, finished)
    data = encode_record(
        rows,
        job.ledger.schema,
        chunk=generated.chunk,
        attempt=attempt,
        plan_hash=job.plan.plan_hash,
        execution_class=generated.execution_class,
        versions=_versions(),
        details={"actor": generated.actor, "generate_seconds": f"{generated.generate_seconds:.3f}"},
    )
    outcome = job.ledger.commit(generated.chunk, attempt, data)
    counts = Counter(row["status"] for row in rows)
    return Receipt(
        chunk=generated.chunk,
        outcome="committed" if outcome == "mine" else "lost",
        actor=generated.actor,
        generate_seconds=generated.generate_seconds,
        finish_seconds=time.perf_counter() - started,
        ok=counts["ok"],
        flagged=counts["flagged"],
        failed=counts["failed"],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finished:
    """A row without the place of its picture, and the picture's file bytes if it has one."""

    row: dict[str, Any]
    data: bytes | None


def _store_pictures(job: Job, chunk: int, attempt: str, finished: Sequence[_Finished]) -> list[dict[str, Any]]:
    images = [(item.row["sample_id"], item.data) for item in finished if item.data is not None]
    stored = job.sink.write(chunk, attempt, images)
    rows = []
    for item in finished:
        image = stored.get(item.row["sample_id"])
        place = {} if image is None else {"image": image.path, "bytes": image.size, "sha256": image.sha256}
        rows.append(item.row | place)
    return rows


def _finish_sample(plan: Plan, sample: PlannedSample, result: GenerationResult, execution_class: str) -> _Finished:
    """One sample's row and file. Whatever is wrong with this sample alone becomes its error, never an exception."""
    if result.status == "failed":
        error = result.error or "the engine gave no picture or no safety verdict"
        return _Finished(row=_row(plan, sample, result, execution_class, error=error), data=None)
    pixels = _kept_pixels(plan, result)
    if pixels is None:
        return _Finished(row=_row(plan, sample, result, execution_class), data=None)
    try:
        picture, mark = _marked(plan, pixels, required=pixels is result.pixels)
        if mark.fault is not None:
            return _Finished(row=_row(plan, sample, result, execution_class, error=mark.fault), data=None)
        data = encode_png(picture, _text(plan, sample.request))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - OpenCV, PyWavelets and Pillow share no base; the chunk must survive
        failed = replace(
            result, pixels=None, error=f"the picture could not be finished: {type(error).__name__}: {error}"
        )
        return _Finished(row=_row(plan, sample, failed, execution_class, error=failed.error), data=None)
    row = _row(plan, sample, result, execution_class)
    row |= {"watermark": mark.method, "watermark_bit_accuracy": mark.accuracy, "pixel_sha256": pixel_sha256(picture)}
    return _Finished(row=row, data=data)


def _kept_pixels(plan: Plan, result: GenerationResult) -> Pixels | None:
    """The policy on flagged pictures; the status stays `flagged` under each of them."""
    assert result.pixels is not None  # noqa: S101 - a result that is not `failed` has pixels
    if result.status == "ok" or plan.on_flagged == "keep":
        return result.pixels
    return blank(result.pixels) if plan.on_flagged == "blank" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """How a picture was marked, what was read back, and why that is not enough, if it is not."""

    method: str
    accuracy: float | None = None
    fault: str | None = None


def _marked(plan: Plan, pixels: Pixels, *, required: bool) -> tuple[Pixels, _Mark]:
    """The picture with the plan's mark; a blank one in a flagged picture's place need not be readable (`required`)."""
    if plan.watermark == "none":
        return pixels, _Mark(method="none")
    from engine import embed_watermark, watermark_bit_accuracy

    methods = [plan.watermark]
    if plan.watermark_policy == "retry" and plan.watermark != RETRY_METHOD:
        methods.append(RETRY_METHOD)
    n_bits = 8 * len(plan.watermark_text.encode())
    needed = bits_needed(n_bits) if required and plan.watermark_policy != "record" else None
    tried = []
    for method in methods:
        picture = embed_watermark(pixels, plan.watermark_text, method)
        accuracy = watermark_bit_accuracy(picture, plan.watermark_text, method)
        if needed is None or matching_bits(accuracy, n_bits) >= needed:
            return picture, _Mark(method=method, accuracy=accuracy)
        tried.append(f"{method} {matching_bits(accuracy, n_bits)}")
    fault = f"the mark cannot be read back: {', '.join(tried)} of {n_bits} bits, {needed} are needed"
    return pixels, _Mark(method=plan.watermark, fault=fault)


def _text(plan: Plan, request: GenerationRequest) -> str:
    version = f"latentmill {plan.versions['latentmill']}"  # the plan's: an upgrade half-way must not change a byte
    return parameters_text(
        request, model_name=plan.model.name, model_hash=plan.model.weights_digest[:10], version=version
    )


def _row(
    plan: Plan, sample: PlannedSample, result: GenerationResult, execution_class: str, *, error: str | None = None
) -> dict[str, Any]:
    """The row of one sample, with no picture yet."""
    request = sample.request
    verdict = result.safety
    return (
        dict.fromkeys(plan.record_schema.names)
        | sample.extra
        | {
            "sample_id": sample.sample_id,
            "row_id": sample.row_id,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "sampler": request.sampler,
            "eta": request.eta,
            "status": "failed" if error is not None else result.status,
            "error": None if error is None else " ".join(error.split())[:_ERROR_LIMIT],
            "nsfw_score": None if verdict is None else verdict.score,
            "nsfw_checker": None if verdict is None else verdict.checker,
            "prompt_tokens": result.prompt_tokens,
            "precision": result.precision,
            "batch_size": result.batch_size,
            "batch_slot": result.batch_slot,
            "execution_class": execution_class,
        }
    )


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return tool_versions()
