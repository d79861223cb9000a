"""From a generated sample to its file and row: the policy on flagged pictures, the watermark, the encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.engine.types import Pixels
from latentmill.jobs.ledger.pictures import blank, encode_png, encode_png_before_4, pixel_sha256
from latentmill.jobs.manifests.parameters import parameters_text
from latentmill.jobs.plans.columns import values
from latentmill.jobs.plans.plan import Plan, PlannedSample
from latentmill.jobs.watermark_bits import bits_needed, matching_bits

RETRY_METHOD = "dwtDctSvd"
"""What the policy `retry` embeds where the plan's own watermark cannot be read back: it holds on smooth pictures."""

_ERROR_LIMIT = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedSample:
    """A row without the place of its picture, and the picture's file bytes if it has one."""

    row: dict[str, Any]
    data: bytes | None


def failed_sample(plan: Plan, sample: PlannedSample, slot: int, error: str, execution_class: str) -> ProcessedSample:
    """A sample for which there is no result at all: what became of the worker that tried is its error."""
    result = GenerationResult(
        pixels=None,
        error=error,
        safety=None,
        prompt_tokens=0,
        precision="fp16" if plan.settings.dtype == "float16" else "fp32",
        batch_size=plan.batch_size,
        batch_slot=slot,
    )
    return postprocess_sample(plan, sample, result, execution_class)


def postprocess_sample(
    plan: Plan, sample: PlannedSample, result: GenerationResult, execution_class: str
) -> ProcessedSample:
    """One sample's row and file. Whatever is wrong with this sample alone becomes its error, never an exception."""
    if result.status == "failed":
        error = result.error or "the engine gave no picture or no safety verdict"
        return ProcessedSample(row=_row(plan, sample, result, execution_class, error=error), data=None)
    pixels = _kept_pixels(plan, result)
    if pixels is None:
        return ProcessedSample(row=_row(plan, sample, result, execution_class), data=None)
    try:
        picture, watermark = _watermarked(plan, pixels, required=pixels is result.pixels)
        if watermark.fault is not None:
            return ProcessedSample(row=_row(plan, sample, result, execution_class, error=watermark.fault), data=None)
        encode = encode_png_before_4 if plan.format_version < 4 else encode_png
        data = encode(picture, _text(plan, sample.request))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - OpenCV and NumPy share no base; the chunk must survive
        failed = replace(
            result, pixels=None, error=f"the picture could not be finished: {type(error).__name__}: {error}"
        )
        return ProcessedSample(row=_row(plan, sample, failed, execution_class, error=failed.error), data=None)
    row = _row(plan, sample, result, execution_class)
    row |= {
        "watermark": watermark.method,
        "watermark_bit_accuracy": watermark.accuracy,
        "pixel_sha256": pixel_sha256(picture),
    }
    return ProcessedSample(row=row, data=data)


def _kept_pixels(plan: Plan, result: GenerationResult) -> Pixels | None:
    """The policy on flagged pictures; the status stays `flagged` under each of them."""
    assert result.pixels is not None  # noqa: S101 - a result that is not `failed` has pixels
    if result.status == "ok" or plan.settings.on_flagged == "keep":
        return result.pixels
    return blank(result.pixels) if plan.settings.on_flagged == "blank" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Watermark:
    """How a picture was watermarked, what was read back, and why that is not enough, if it is not."""

    method: str
    accuracy: float | None = None
    fault: str | None = None


def _watermarked(plan: Plan, pixels: Pixels, *, required: bool) -> tuple[Pixels, _Watermark]:
    """The picture with the plan's watermark, which need not be readable in a flagged picture's blank (`required`)."""
    if plan.settings.watermark == "none":
        return pixels, _Watermark(method="none")
    from latentmill.engine import embed_watermark, watermark_bit_accuracy

    methods = [plan.settings.watermark]
    if plan.settings.watermark_policy == "retry" and plan.settings.watermark != RETRY_METHOD:
        methods.append(RETRY_METHOD)
    n_bits = 8 * len(plan.settings.watermark_text.encode())
    needed = bits_needed(n_bits) if required and plan.settings.watermark_policy != "record" else None
    tried = []
    for method in methods:
        picture = embed_watermark(pixels, plan.settings.watermark_text, method)
        accuracy = watermark_bit_accuracy(picture, plan.settings.watermark_text, method)
        if needed is None or matching_bits(accuracy, n_bits) >= needed:
            return picture, _Watermark(method=method, accuracy=accuracy)
        tried.append(f"{method} {matching_bits(accuracy, n_bits)}")
    fault = f"the watermark cannot be read back: {', '.join(tried)} of {n_bits} bits, {needed} are needed"
    return pixels, _Watermark(method=plan.settings.watermark, fault=fault)


def _text(plan: Plan, request: GenerationRequest) -> str:
    version = f"latentmill {plan.versions['latentmill']}"  # the plan's: an upgrade half-way must not change a byte
    return parameters_text(
        request, model_name=plan.model.name, model_hash=plan.model.weights_digest[:10], version=version
    )


def _row(
    plan: Plan, sample: PlannedSample, result: GenerationResult, execution_class: str, *, error: str | None = None
) -> dict[str, Any]:
    """The row of one sample, with no picture yet."""
    return (
        dict.fromkeys(plan.record_schema.names)
        | sample.extra
        | values(plan.columns, "sample", sample)
        | values(plan.columns, "result", result)
        | {
            "status": "failed" if error is not None else result.status,
            "error": None if error is None else " ".join(error.split())[:_ERROR_LIMIT],
            "execution_class": execution_class,
        }
        | plan.row_constants
    )
