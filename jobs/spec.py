"""What a user asks for: one job, from a job file and flags, checked but not yet planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentmill.engine import LONG_PROMPTS, PROMPT_SYNTAXES, WATERMARK_METHODS
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import FIELDS, FieldError, nearest, shorten, text_fault
from latentmill.jobs.manifests.parameters import MANIFEST_FORMATS
from latentmill.jobs.night import PLACEHOLDER, Night, tonight
from latentmill.jobs.plans.sweep import build_axes, parse_axis
from latentmill.jobs.store.urls import allowed_filesystem, display_url

if TYPE_CHECKING:
    import datetime

FORMATS = ("files",)
SAFETY = ("auto", "open-nsfw", "clip-concepts", "none")
WATERMARKS = (*WATERMARK_METHODS, "none")
WATERMARK_POLICIES = ("record", "require", "retry")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "original")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "format": FORMATS,
    "safety": SAFETY,
    "watermark": WATERMARKS,
    "watermark_policy": WATERMARK_POLICIES,
    "prompt_syntax": PROMPT_SYNTAXES,
    "long_prompts": LONG_PROMPTS,
    "manifest_format": MANIFEST_FORMATS,
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": TIMESTEP_SPACINGS,
}
MAX_CHUNK = 4096
MAX_JOB_FILE_BYTES = 1_000_000
SAMPLE_MANIFEST = Path(__file__).parents[1] / "configs" / "prompts" / "sample.txt"
"""The prompts in the package, which are drawn where none are named."""


class Runtime(BaseModel):
    """How the job is run. Nothing here can change a pixel or a row, so nothing here is part of the plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    executor: Literal["ray", "inline"] = "ray"
    address: str | None = None
    insecure_ray: bool = False
    single_writer: bool = False
    retry_failed: bool = False
    chunk_timeout: float | None = Field(default=None, gt=0, le=7 * 86_400)
    num_actors: int | None = Field(default=None, ge=1, le=10_000)
    gpus_per_actor: float | None = Field(default=None, ge=0, le=64)
    cpus_per_actor: float | None = Field(default=None, ge=0, le=1024)
    accelerator_type: str | None = Field(default=None, pattern=r"^[\w.-]{1,64}$")
    allow_mixed_accelerators: bool = False

    @model_validator(mode="after")
    def _gpus_of_a_cluster(self) -> Runtime:
        if self.executor == "inline" and self.accelerator_type is not None:
            raise ValueError(
                f"accelerator_type {self.accelerator_type} chooses among a cluster's GPUs, but executor is inline; "
                f"leave one of them out"
            )
        return self


class JobSpec(BaseModel):
    """One job. None means: not said here; the manifest's column, the model's preset or a computed default decides.

    `night` is set by `resolve`, where `out` was a template.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...]
    manifest_format: str = "auto"
    out: str = "out"
    model: str = "embedded"
    revision: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    prompt_syntax: str = "plain"
    long_prompts: str = "truncate"
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    negative_prompt: str | None = None
    seed: int = 42
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    eta: float | None = None
    num_images: int = 1
    chunk_size: int = Field(default=32, ge=1, le=MAX_CHUNK)
    batch_size: int | None = Field(default=None, ge=1, le=MAX_CHUNK)
    format: str = "files"
    safety: str = "auto"
    nsfw_threshold: float = Field(default=0.8, gt=0, le=1)
    on_flagged: Literal["blank", "drop", "keep"] = "blank"
    watermark: str = "dwtDctSvd"
    watermark_text: str = "StableDiffusionV1"
    watermark_policy: str = "record"
    dtype: Literal["auto", "float32", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_actor: int | None = Field(default=None, ge=1, le=1024)
    strict: bool = False
    accept_aliases: bool = False
    runtime: Runtime = Field(default_factory=Runtime)
    night: Night | None = None

    @model_validator(mode="before")
    @classmethod
    def _fold_runtime(cls, data: Any) -> Any:
        """Job files and flags are flat: `executor`, `address` and the like belong into `runtime`."""
        return _fold(data) if isinstance(data, Mapping) else data

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("prompts")
    @classmethod
    def _some_prompts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("no manifest is named; give a file, for example configs/prompts/sample.txt")
        return value

    @field_validator("out")
    @classmethod
    def _allowed_out(cls, value: str) -> str:
        try:
            allowed_filesystem(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        if PLACEHOLDER in value:
            raise ValueError(f"{PLACEHOLDER} stands for a day, and must have been replaced by one before")
        return value

    @field_validator("sweep", mode="before")
    @classmethod
    def _sweep_as_mapping(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                str(name): list(values) if isinstance(values, (list, tuple)) else split_values(str(name), values)
                for name, values in value.items()
            }
        return value

    @field_validator("sweep")
    @classmethod
    def _known_axes(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        try:
            build_axes(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator(*sorted(FIELDS.keys() - {"prompt", "id"}), mode="before")
    @classmethod
    def _parameter(cls, value: Any, info: Any) -> Any:
        if value is None:
            return None
        try:
            return FIELDS[info.field_name].parse(value)
        except FieldError as error:
            raise ValueError(str(error)) from None

    @field_validator(*_CHOICES)
    @classmethod
    def _known_choice(cls, value: str | None, info: Any) -> str | None:
        known = _CHOICES[info.field_name]
        if value is not None and value not in known:
            raise ValueError(
                f"{info.field_name} {shorten(value)} does not exist{nearest(value, known)}; there is {', '.join(known)}"
            )
        return value

    @field_validator("watermark_text")
    @classmethod
    def _printable_mark(cls, value: str) -> str:
        if not value or len(value.encode("utf-8", "replace")) > 32 or text_fault(value):
            raise ValueError(
                f"watermark_text {shorten(value)} must have 1 to 32 bytes of UTF-8; shorten it, or use watermark none"
            )
        return value

    @model_validator(mode="after")
    def _a_mark_to_require(self) -> JobSpec:
        if self.watermark == "none" and self.watermark_policy != "record":
            raise ValueError(
                f"watermark_policy {self.watermark_policy!r} asks for a mark, but watermark is none; "
                f"choose {' or '.join(WATERMARK_METHODS)}, or watermark_policy record"
            )
        return self


RUNTIME_KEYS = frozenset(Runtime.model_fields)
KEYS = frozenset(JobSpec.model_fields) - {"runtime", "night"} | RUNTIME_KEYS | {"date"}
"""Every key of a job file, which is every flag with underscores."""


def split_values(name: str, value: Any) -> list[Any]:
    """One axis value of a job file, or the text of several as a flag has it: `ddim,plms`."""
    if isinstance(value, str) and name != "negative_prompt":
        return parse_axis(f"{name}={value}")[1]
    return [value]


def load_job_file(path: str) -> dict[str, Any]:
    """The job file's keys, flat, unknown ones refused with the nearest known one."""
    fs, inside = allowed_filesystem(path)
    try:
        if fs.exists(inside) and not fs.isfile(inside):
            raise UsageError(f"job file {display_url(path)} is no regular file; see configs/jobs for examples")
        if fs.size(inside) > MAX_JOB_FILE_BYTES:
            raise UsageError(
                f"job file {display_url(path)} has more than {MAX_JOB_FILE_BYTES:,} bytes; is it a manifest?"
            )
        content = yaml.safe_load(fs.cat_file(inside))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"job file {display_url(path)} does not exist; see configs/jobs for examples") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"job file {display_url(path)} is not YAML: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:
        raise UsageError(f"job file {display_url(path)} cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"job file {display_url(path)} is not a mapping of keys to values; see configs/jobs for examples"
        )
    flat = _flatten(content)
    for key in flat:
        if key not in KEYS:
            raise UsageError(f"job file {display_url(path)}: unknown key {shorten(key)}{nearest(str(key), KEYS)}")
    return flat


def resolve(
    job_file: str | None, flags: Mapping[str, Any], *, today: datetime.date | None = None, or_sample: bool = False
) -> JobSpec:
    """The job: the file's keys, overridden by every flag that is not None.

    `flags["sweep"]` is a list of `AXIS=VALUES`; an axis given by flag replaces the file's axis of that name and keeps
    its place, and the file's other axes stay. `{date}` in `out` is replaced by the key `date`, else by `today`, by
    default the day in UTC. With `or_sample`, a job without a file and without prompts draws the package's sample.
    """
    merged = load_job_file(job_file) if job_file is not None else {}
    given = {key: value for key, value in flags.items() if value is not None}
    axes = given.pop("sweep", None)
    if axes:
        merged["sweep"] = _merge_axes(merged.get("sweep"), axes)
    if not given.get("prompts", True):
        given.pop("prompts")
    merged.update(_flatten(given))
    if or_sample and job_file is None:
        merged.setdefault("prompts", [str(SAMPLE_MANIFEST)])
    if not merged.get("prompts"):
        raise UsageError(
            "no manifest is named; give a file, for example configs/prompts/sample.txt, or a job file with 'prompts'"
        )
    night = tonight(str(merged.get("out", "")), merged.pop("date", None), today)
    if night is not None:
        merged |= {"out": night.out, "night": night}
    try:
        return JobSpec.model_validate(merged)
    except ValidationError as error:
        raise UsageError(_first_fault(error)) from None


def _merge_axes(from_file: Any, flags: list[str]) -> dict[str, Any]:
    axes = dict(from_file) if isinstance(from_file, Mapping) else {}
    seen: set[str] = set()
    for text in flags:
        name, values = parse_axis(text)
        if name in seen:
            raise UsageError(f"--sweep {name} is given twice; list all its values in one: {name}=a,b,c")
        seen.add(name)
        axes[name] = values
    return axes


def _flatten(content: Mapping[Any, Any]) -> dict[Any, Any]:
    runtime = content.get("runtime")
    rest = {key: value for key, value in content.items() if key != "runtime" or not isinstance(runtime, Mapping)}
    return {**rest, **runtime} if isinstance(runtime, Mapping) else rest


def _fold(data: Mapping[Any, Any]) -> dict[Any, Any]:
    loose = {key: value for key, value in data.items() if key in RUNTIME_KEYS}
    if not loose:
        return dict(data)
    runtime = data.get("runtime", {})
    given = runtime.model_dump() if isinstance(runtime, Runtime) else dict(runtime)
    return {**{key: value for key, value in data.items() if key not in loose}, "runtime": {**given, **loose}}


def _first_fault(error: ValidationError) -> str:
    """Pydantic's first complaint as one line in our words."""
    fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"] if part != "runtime") or "job"
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, KEYS)}"
    message = fault["msg"].removeprefix("Value error, ")
    if message.startswith((f"{key} ", "no manifest", "sweep axis", "watermark_policy ", "accelerator_type ")):
        return message
    shown = display_url(fault["input"]) if isinstance(fault["input"], str) else fault["input"]
    return f"{key} is {shorten(shown)}: {message[:1].lower()}{message[1:]}"
