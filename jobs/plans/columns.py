"""The columns of a commit record, each declared once: name, type, what it says, where it comes from, what must hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from latentmill.jobs.manifests.images import PlannedImage
from latentmill.jobs.xmp import DIGITAL_SOURCE_TYPE

if TYPE_CHECKING:
    from latentmill.engine import GenerationResult
    from latentmill.jobs.models.resolved import ResolvedModel
    from latentmill.jobs.plans.sample import PlannedSample
    from latentmill.jobs.spec import JobSpec

STATUSES = ("ok", "flagged", "failed")

Row = Mapping[str, Any]
Source = Literal["sample", "job", "result", "postprocess", "storage"]


class PlannedJob(Protocol):
    """What a column may ask of a plan."""

    settings: JobSpec
    model: ResolvedModel
    versions: Mapping[str, str]


Rule = Callable[[Row, PlannedJob], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a row.

    `source`: the plan knows it, of each `sample` or for the whole `job`; it is in the engine's `result`; `postprocess`
    or `storage` (jobs/postprocess.py, jobs/worker.py) puts it into the row by its name. `value` takes it from a planned
    sample, a plan or a result. `rule` says what is wrong with it in a row of that plan; where the plan knows the value,
    `verify` demands that one. What is the same for the whole job is in the metadata of Parquet files as well.
    `of_picture`: it is held against the picture's file. `since` is the first format of outputs that has it. Only an
    output whose manifest has the column `beside` has it, if that is given.
    """

    name: str
    type: pa.DataType
    text: str
    source: Source
    value: Callable[[Any], Any] | None = None
    rule: Rule | None = None
    of_picture: bool = False
    since: int = 2
    beside: str | None = None

    @property
    def demand(self) -> str:
        """What `verify` demands of it, in words; empty if nothing."""
        if self.source in {"sample", "job"}:
            return "as planned"
        if self.of_picture:
            return "as its picture"
        return ((self.rule.__doc__ if self.rule else None) or "").rstrip(".")


def _request(name: str, type_: pa.DataType, text: str, since: int = 2) -> Column:
    return _sample(name, type_, text, lambda sample: getattr(sample.request, name), since)


def _sample(name: str, type_: pa.DataType, text: str, value: Callable[[PlannedSample], Any], since: int = 2) -> Column:
    return Column(name=name, type=type_, text=text, source="sample", value=value, since=since)


def _of_image(name: str, text: str, value: Callable[[PlannedImage], Any]) -> Column:
    def of_sample(sample: PlannedSample) -> Any:
        image = sample.request.image
        return value(image) if isinstance(image, PlannedImage) else None

    return replace(_sample(name, pa.string(), text, of_sample), beside="image")


def _setting(name: str, type_: pa.DataType, text: str, since: int = 3) -> Column:
    return _job(name, type_, text, lambda plan: getattr(plan.settings, name), since)


def _job(name: str, type_: pa.DataType, text: str, value: Callable[[PlannedJob], Any], since: int = 3) -> Column:
    return Column(name=name, type=type_, text=text, source="job", value=value, since=since)


def _result(
    name: str,
    type_: pa.DataType,
    text: str,
    value: Callable[[GenerationResult], Any],
    rule: Rule | None = None,
    since: int = 2,
) -> Column:
    return Column(name=name, type=type_, text=text, source="result", value=value, rule=rule, since=since)


def _by_name(
    source: Literal["postprocess", "storage"],
    name: str,
    type_: pa.DataType,
    text: str,
    rule: Rule | None = None,
    *,
    of_picture: bool = False,
    since: int = 2,
) -> Column:
    return Column(name=name, type=type_, text=text, source=source, rule=rule, of_picture=of_picture, since=since)


def _digest(plan: PlannedJob) -> str | None:
    return plan.model.digest if plan.model.fault is None else None


def _status_rule(row: Row, _: PlannedJob) -> str | None:
    """One of the three."""
    return None if row["status"] in STATUSES else f"its status is {row['status']!r}"


def _error_rule(row: Row, _: PlannedJob) -> str | None:
    """there, if it failed."""
    return "it failed, without a reason" if row["status"] == "failed" and row["error"] is None else None


def _image_rule(row: Row, plan: PlannedJob) -> str | None:
    """there, if it is ok; absent, if it failed; as `on_flagged` says, if it is flagged."""
    status, policy, absent = row["status"], plan.settings.on_flagged, row["image"] is None
    if status == "failed" and not absent:
        return "it failed, with a picture"
    if status == "ok" and absent:
        return "it is ok, without a picture"
    if status == "flagged" and absent != (policy == "drop"):
        return f"it is flagged, and its picture does not follow the policy {policy!r}"
    return None


def _checker_rule(row: Row, plan: PlannedJob) -> str | None:
    """there, unless it failed; `none` only if that was planned."""
    checker, planned = row["nsfw_checker"], plan.settings.safety
    if row["status"] != "failed" and (checker is None or (checker == "none") != (planned == "none")):
        return f"its safety checker is {checker!r}, the plan says {planned!r}"
    return None


COLUMNS: tuple[Column, ...] = (
    _sample(
        "sample_id",
        pa.string(),
        "Number of the sample in the plan, padded with zeros; the name of its picture.",
        lambda sample: sample.sample_id,
    ),
    _sample("row_id", pa.string(), "The manifest's `id`, else the row's number.", lambda sample: sample.row_id),
    _request("prompt", pa.string(), "As it was drawn."),
    _request("negative_prompt", pa.string(), "As it was drawn; empty for none."),
    _request("seed", pa.uint32(), "Of all noise of this sample."),
    _request("width", pa.uint16(), "Pixels."),
    _request("height", pa.uint16(), "Pixels."),
    _request("num_inference_steps", pa.uint16(), "Denoising steps."),
    _request("guidance_scale", pa.float32(), "Weight of the prompt."),
    _request("sampler", pa.string(), "Name from the table of samplers."),
    _request("eta", pa.float32(), "Noise added by DDIM."),
    _by_name("postprocess", "status", pa.string(), "`ok`, `flagged` or `failed`.", _status_rule),
    _by_name("postprocess", "error", pa.string(), "Why it failed; null otherwise.", _error_rule),
    _result(
        "nsfw_score",
        pa.float32(),
        "The safety checker's highest score; null without a checker.",
        lambda result: None if result.safety is None else result.safety.score,
    ),
    _result(
        "nsfw_checker",
        pa.string(),
        "Name of the safety checker that judged, or `none`.",
        lambda result: None if result.safety is None else result.safety.checker,
        _checker_rule,
    ),
    _by_name("postprocess", "watermark", pa.string(), "How it was watermarked: `dwtDctSvd`, `dwtDct` or `none`."),
    _by_name("postprocess", "watermark_bit_accuracy", pa.float32(), "Share of its bits that were read back."),
    _by_name(
        "storage",
        "image",
        pa.string(),
        "Path of the picture, relative to the output; null if none was written.",
        _image_rule,
    ),
    _by_name("storage", "bytes", pa.uint32(), "Size of the picture's file.", of_picture=True),
    _by_name("storage", "sha256", pa.string(), "Digest of the picture's file.", of_picture=True),
    _by_name(
        "postprocess",
        "pixel_sha256",
        pa.string(),
        "Digest of the pixels as they were encoded, after the watermark.",
        of_picture=True,
    ),
    _result(
        "prompt_tokens",
        pa.uint32(),
        "Length of the prompt, before truncation.",
        lambda result: result.prompt_tokens,
    ),
    _result(
        "precision",
        pa.string(),
        "`fp16`, `bf16`, `fp32`, or `fp32-retry` where half precision overflowed.",
        lambda result: result.precision,
    ),
    _result("batch_size", pa.uint16(), "Rows of the batch it was drawn in.", lambda result: result.batch_size),
    _result("batch_slot", pa.uint16(), "Its place in that batch.", lambda result: result.batch_slot),
    _by_name(
        "postprocess",
        "execution_class",
        pa.string(),
        "Device, dtype, torch version, threads, batch size: what bitwise equality depends on.",
    ),
    _job("model", pa.string(), "Preset, path, URL or hub id, as it was named.", lambda plan: plan.model.source),
    _job("model_sha256", pa.string(), "One digest of all the model's files.", _digest),
    _job("revision", pa.string(), "The commit of a hub id.", lambda plan: plan.model.revision),
    _job("tokenizer", pa.string(), "The vocabulary's place, where it was named.", lambda plan: plan.model.tokenizer),
    _job("prediction_type", pa.string(), "What the U-Net predicts.", lambda plan: plan.model.predicts),
    _job("timestep_spacing", pa.string(), "How timesteps were placed.", lambda plan: plan.model.spacing),
    _setting("prompt_syntax", pa.string(), "How brackets in prompts were read."),
    _setting("long_prompts", pa.string(), "What happened to prompts that are too long."),
    _job(
        "safety_threshold",
        pa.float32(),
        "Score that flags a picture.",
        lambda plan: None if plan.settings.safety == "none" else plan.settings.nsfw_threshold,
    ),
    _setting("on_flagged", pa.string(), "What was stored in place of a flagged picture."),
    _setting("watermark_text", pa.string(), "The watermark's text."),
    _job("version", pa.string(), "Of latentmill.", lambda plan: plan.versions["latentmill"]),
    _job(
        "digital_source_type",
        pa.string(),
        "How pictures came about, as each file's XMP states it: IPTC's `trainedAlgorithmicMedia`.",
        lambda _: DIGITAL_SOURCE_TYPE,
        since=4,
    ),
    _by_name(
        "postprocess",
        "reused_from",
        pa.string(),
        "The picture of another output that `--reuse` took it from; null if it was drawn for this one.",
        since=5,
    ),
    _of_image(
        "init_image",
        "The manifest's `image`, as an absolute path or URL; this and the next four if it has that column.",
        lambda it: it.place,
    ),
    _of_image("init_image_sha256", "Digest of that file.", lambda it: it.sha256),
    replace(_request("strength", pa.float32(), "Share of the steps, taken from the image."), beside="image"),
    _of_image("mask", "Its mask, as an absolute path or URL; null without.", lambda it: it.mask),
    _of_image("mask_sha256", "Digest of that file.", lambda it: it.mask_sha256),
)
"""The columns that the project writes itself, in order; a plan appends the manifest's other columns.

With those of the `job`, which are the same in all its rows, a row can leave its dataset and still be made again
(jobs/recipe.py).
"""

MIXED_CHUNKS_SINCE = 4
"""The first format whose chunks are cut from all samples of one shape; before it, each had one sampler and one number
of steps.
"""


def formats() -> tuple[int, ...]:
    """The formats of outputs that can be read; the last is that of what is planned now."""
    return tuple(sorted({MIXED_CHUNKS_SINCE, *(column.since for column in COLUMNS)}))


def columns_of(format_version: int, own: Collection[str] = ()) -> tuple[Column, ...]:
    """The columns of an output of that format whose manifest has these of ours: it keeps those that it began with."""
    return tuple(
        column
        for column in COLUMNS
        if column.since <= format_version and (column.beside is None or column.beside in own)
    )


def own_fields(format_version: int | None = None) -> tuple[pa.Field, ...]:
    """Their names and types, for a schema; by default of what is planned now."""
    version = formats()[-1] if format_version is None else format_version
    return tuple(pa.field(column.name, column.type) for column in columns_of(version))


def own_names() -> frozenset[str]:
    """The names of the columns of what is planned now."""
    return frozenset(field.name for field in own_fields())


def stored(column: Column, value: Any) -> Any:
    """The value as the column's type stores it."""
    return float(np.float32(value)) if column.type == pa.float32() and value is not None else value


def values(columns: tuple[Column, ...], source: Source, origin: Any) -> dict[str, Any]:
    """What the columns with that source take from a planned sample, a plan or a result."""
    return {column.name: column.value(origin) for column in columns if column.source == source and column.value}
