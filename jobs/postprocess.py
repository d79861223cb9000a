"""From a generated sample to its file and row: the policy on flagged pictures, the watermark, the encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from latentmill.engine import PRECISIONS, GenerationRequest, GenerationResult
from latentmill.engine.types import Pixels
from latentmill.jobs.ledger.picture_store import Origin
from latentmill.jobs.ledger.pictures import blank, encode_png, encode_png_before_4, pixel_sha256
from latentmill.jobs.manifests.parameters import parameters_text
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.plans.columns import values
from latentmill.jobs.plans.plan import Plan, PlannedSample
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.watermark_bits import bits_needed, matching_bits

RETRY_METHOD = "dwtDctSvd"
"""What the policy `retry` embeds where the plan's own watermark cannot be read back: it holds on smooth pictures."""

_ERROR_LIMIT = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedSample:
    """A row without the place of its picture, and the picture's file bytes if it has one.

    `origin` is where a file with these very bytes lies in another output.
    """

    row: dict[str, Any]
    data: bytes | None
    origin: Origin | None = None


def failed_sample(
    plan: Plan, sample: PlannedSample, slot: int, error: str, execution_class: str | None
) -> ProcessedSample:
    """A sample for which there is no result at all: what became of the worker that tried is its error."""
    result = GenerationResult(
        pixels=None,
        error=error,
        safety=None,
        prompt_tokens=0,
        precision=PRECISIONS[plan.settings.dtype],
        batch_size=plan.batch_size,
        batch_slot=slot,
    )
    return postprocess_sample(plan, sample, result, execution_class)


def postprocess_sample(
    plan: Plan, sample: PlannedSample, result: GenerationResult, execution_class: str | None
) -> ProcessedSample:
    """One sample's row and file. Whatever is wrong with this sample alone becomes its error, never an exception."""
    if result.status == "failed":
        error = result.error or "the engine gave no picture or no safety verdict"
        return ProcessedSample(row=_row(plan, sample, result, execution_class, error=error), data=None)
    try:
        finished = finish_pixels(plan.settings, result)
        if finished is None:
            return ProcessedSample(row=_row(plan, sample, result, execution_class), data=None)
        if finished.fault is not None:
            return ProcessedSample(row=_row(plan, sample, result, execution_class, error=finished.fault), data=None)
        version = plan.versions["latentmill"]  # the plan's: an upgrade half-way must not change a byte
        model = plan.models[sample.model]
        data = encode_picture(finished.pixels, sample.request, model, version, plan.format_version)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - OpenCV and NumPy share no base; the chunk must survive
        failed = replace(
            result, pixels=None, error=f"the picture could not be finished: {type(error).__name__}: {error}"
        )
        return ProcessedSample(row=_row(plan, sample, failed, execution_class, error=failed.error), data=None)
    row = _row(plan, sample, result, execution_class)
    row |= {
        "watermark": finished.watermark,
        "watermark_bit_accuracy": finished.accuracy,
        "pixel_sha256": pixel_sha256(finished.pixels),
    }
    return ProcessedSample(row=row, data=data)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedPixels:
    """A picture as it is handed to the encoder; how it was watermarked, what was read back, and why that is not enough,
    if it is not.
    """

    pixels: Pixels
    watermark: str
    accuracy: float | None = None
    fault: str | None = None


def finish_pixels(settings: JobSpec, result: GenerationResult) -> FinishedPixels | None:
    """A picture that did not fail, as the settings want it: blanked if it is flagged, and watermarked. None if dropped.

    The status stays `flagged` under each policy. A flagged picture's blank need not have a readable watermark.
    """
    assert result.pixels is not None  # noqa: S101 - a result that is not `failed` has pixels
    if result.status == "ok" or settings.on_flagged == "keep":
        return _watermarked(settings, result.pixels, required=True)
    return _watermarked(settings, blank(result.pixels), required=False) if settings.on_flagged == "blank" else None


def _watermarked(settings: JobSpec, pixels: Pixels, *, required: bool) -> FinishedPixels:
    if settings.watermark == "none":
        return FinishedPixels(pixels=pixels, watermark="none")
    from latentmill.engine import embed_watermark, watermark_bit_accuracy

    methods = [settings.watermark]
    if settings.watermark_policy == "retry" and settings.watermark != RETRY_METHOD:
        methods.append(RETRY_METHOD)
    n_bits = 8 * len(settings.watermark_text.encode())
    needed = bits_needed(n_bits) if required and settings.watermark_policy != "record" else None
    tried = []
    for method in methods:
        picture = embed_watermark(pixels, settings.watermark_text, method)
        accuracy = watermark_bit_accuracy(picture, settings.watermark_text, method)
        if needed is None or matching_bits(accuracy, n_bits) >= needed:
            return FinishedPixels(pixels=picture, watermark=method, accuracy=accuracy)
        tried.append(f"{method} {matching_bits(accuracy, n_bits)}")
    fault = f"the watermark cannot be read back: {', '.join(tried)} of {n_bits} bits, {needed} are needed"
    return FinishedPixels(pixels=pixels, watermark=settings.watermark, fault=fault)


def encode_picture(
    pixels: Pixels, request: GenerationRequest, model: ResolvedModel, version: str, format_version: int
) -> bytes:
    """The file of a finished picture in an output of that format, begun by that version of latentmill."""
    text = parameters_text(
        request, model_name=model.name, model_hash=model.weights_digest[:10], version=f"latentmill {version}"
    )
    return encode_png_before_4(pixels, text) if format_version < 4 else encode_png(pixels, text)


def _row(
    plan: Plan,
    sample: PlannedSample,
    result: GenerationResult,
    execution_class: str | None,
    *,
    error: str | None = None,
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
        | plan.constants_of(sample.model)
    )
