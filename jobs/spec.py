"""What a user asks for: one job, each of its settings declared once and checked, but not yet planned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentmill.engine import (
    EXECUTIONS,
    LONG_PROMPTS,
    PRECISIONS,
    PROMPT_SYNTAXES,
    SAFETY_CHECKERS,
    SAMPLER_CHOICES,
    WATERMARK_METHODS,
)
from latentmill.jobs.dated import PLACEHOLDER, DatedOutput
from latentmill.jobs.errors import UsageError
from latentmill.jobs.executor_table import EXECUTORS
from latentmill.jobs.manifests.axes import build_axes, build_dimensions, listed_values
from latentmill.jobs.manifests.fields import DEFAULT_STRENGTH, FieldError, nearest, shorten, text_fault
from latentmill.jobs.manifests.formats import CHOICES, SUFFIXES, describe_choices
from latentmill.jobs.manifests.loras import parse_loras
from latentmill.jobs.manifests.prompt_texts import TEMPLATES
from latentmill.jobs.settings import (
    CUTTING,
    INPUT,
    PICTURES,
    RUNNING,
    SAFETY,
    Setting,
    choice,
    number,
    parameter,
    settings_of,
    special,
    switch,
    text,
    whole,
)
from latentmill.jobs.store.urls import allowed_filesystem, display_url, place_of

ON_FLAGGED = ("blank", "drop", "keep")
WATERMARKS = ("dwtDctSvd", "dwtDct", "none")
WATERMARK_POLICIES = ("record", "require", "retry")
REUSE_BY = ("copy", "link")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "original")
DTYPES = ("auto", *PRECISIONS)
DEVICES = ("auto", "cpu", "cuda")
MAX_CHUNK = 4096
"""The most samples of a chunk, and so the most rows of a commit record."""


def _prompts(_: str, value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
        raise FieldError(f"prompts is {shorten(value)}, expected one file or a list of files")
    if not given:
        raise FieldError("no manifest is named; give a file, or a job file with 'prompts'")
    return tuple(given)


def _out(_: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(f"out is {shorten(value)}, expected a folder or a URL")
    allowed_filesystem(value)
    if PLACEHOLDER in value:
        raise FieldError(f"{PLACEHOLDER} in out stands for a day, and must have been replaced by one before")
    return value


def _sweep(_: str, value: Any) -> dict[str, list[Any]]:
    if not isinstance(value, Mapping):
        raise FieldError(f"sweep is {shorten(value)}, expected a mapping of axes to lists of values")
    axes = {str(name): listed_values(str(name), values) for name, values in value.items()}
    build_axes(axes)
    return axes


def _zip(name: str, value: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of axes: each is a list of names, or a text with commas between them."""
    groups = [value] if isinstance(value, str) else value
    if not isinstance(groups, list | tuple):
        raise FieldError(f"{name} is {shorten(value)}, expected groups of axes such as width,height")
    parsed = [group.split(",") if isinstance(group, str) else group for group in groups]
    if not all(isinstance(group, list | tuple) and all(isinstance(axis, str) for axis in group) for group in parsed):
        raise FieldError(f"{name} is {shorten(value)}, expected groups of axes such as width,height")
    return tuple(tuple(axis.strip() for axis in group) for group in parsed)


def _reuse(name: str, value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
        raise FieldError(f"{name} is {shorten(value)}, expected the output of another job, or a list of such")
    for place in given:
        allowed_filesystem(place)
    return tuple(dict.fromkeys(given))


def _watermark_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or len(value.encode("utf-8", "replace")) > 32 or text_fault(value):
        raise FieldError(f"{name} {shorten(value)} must have 1 to 32 bytes of UTF-8; shorten it, or use watermark none")
    return value


def _shard(name: str, value: Any) -> str:
    found = re.fullmatch(r"([1-9]\d{0,4})/([1-9]\d{0,4})", value) if isinstance(value, str) else None
    if found is None or int(found[1]) > int(found[2]):
        raise FieldError(f"{name} is {shorten(value)}, expected I/N, the Ith of N runs: 1/8 is the first of eight")
    return found[0]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How the job is run. Nothing here can change a pixel or a row, so nothing here is part of the plan."""

    executor: str = choice(
        "ray", RUNNING, f"Where chunks run: {', '.join(EXECUTORS)}; inline is this process.", tuple(EXECUTORS)
    )
    address: str | None = text(
        None,
        RUNNING,
        "Ray cluster, HOST:6379; default RAY_ADDRESS, else one on this machine. For submit: http://HEAD:8265.",
    )
    insecure_ray: bool = switch(RUNNING, "Join a cluster without token authentication: anyone can run code on it.")
    retry_failed: bool = switch(RUNNING, "Make the samples that failed once more; all others stay as they are.")
    chunk_timeout: float | None = number(
        None,
        RUNNING,
        "Seconds a chunk may take before its worker counts as hung; measured if not given.",
        0.001,
        7 * 86_400,
    )
    shard: str | None = special(
        RUNNING,
        "I/N: make the Ith of N parts, counted from 1; N runs need nothing else. Exit code 4: others are not done.",
        _shard,
        default=None,
    )
    reuse: tuple[str, ...] = special(
        RUNNING,
        "OTHER_OUT, or the latest.json of dated ones: take the pictures that it already has; may be repeated.",
        _reuse,
        default=(),
        several=True,
    )
    reuse_by: str = choice(
        "copy", RUNNING, "copy the pictures that --reuse takes, or link them: no space, on one disk only.", REUSE_BY
    )
    num_actors: int | None = whole(None, RUNNING, "Most models at work at once.", 1, 10_000)
    gpus_per_actor: float | None = number(None, RUNNING, "GPUs per model, fractions allowed.", 0, 64)
    cpus_per_actor: float | None = number(None, RUNNING, "CPUs that Ray sets aside per model.", 0, 1024)
    accelerator_type: str | None = text(
        None,
        RUNNING,
        "Use only the cluster's GPUs of this type, e.g. H100: bits differ.",
        pattern=r"[\w.-]{1,64}",
    )
    allow_mixed_accelerators: bool = switch(RUNNING, "Use GPUs of any type, though the bits of pictures differ.")
    gpu_hour_price: float | None = number(
        None, RUNNING, "What an hour of a GPU costs, to say what the run costs.", 0, 1_000_000
    )
    log_json: bool = switch(RUNNING, "Tell progress, notes and errors as JSON lines on standard error.")
    single_writer: bool = switch(RUNNING, "Accept a store without create-only writes: never run two drivers there.")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job. None means: not said here; the manifest's column, the model's preset or a computed default decides.

    `dated` is set where `out` was a template, `is_sample` where no prompts were named (jobs/job_file.py).
    """

    prompts: tuple[str, ...] = special(
        INPUT,
        f"Prompt files, globs or URLs: .{' .'.join(SUFFIXES)}, gzip too; - reads standard input.",
        _prompts,
        several=True,
        metavar="PROMPTS",
    )
    manifest_format: str = choice(
        "auto",
        INPUT,
        describe_choices(),
        CHOICES,
    )
    out: str = special(INPUT, "Folder or URL (s3://...) of the dataset.", _out, default="out")
    date: str | None = text(None, INPUT, "The day that {date} in --out stands for, YYYY-MM-DD. Default: today, UTC.")
    strict: bool = switch(INPUT, "Refuse the job if any row is bad, or a column looks misspelled.")
    accept_aliases: bool = switch(INPUT, "Read columns named as elsewhere: steps, cfg_scale, neg_prompt, caption, ...")
    model: str = text(
        "embedded",
        PICTURES,
        "A preset (see `latentmill models`), PRESET=PLACE, folder, .safetensors, .ckpt, s3://... or hub id.",
    )
    revision: str | None = text(None, PICTURES, "Commit or branch of a hub id.")
    tokenizer: str | None = text(
        None,
        PICTURES,
        "Folder or hub id of the vocabulary, for a single file. A whole model's also gives parts that the file lacks.",
    )
    prediction_type: str | None = choice(
        None, PICTURES, "What a single file predicts: epsilon, v_prediction or sample.", PREDICTION_TYPES
    )
    timestep_spacing: str | None = choice(
        None,
        PICTURES,
        "leading, trailing, linspace or original, in place of the model's own.",
        TIMESTEP_SPACINGS,
    )
    vae: str | None = text(
        None, PICTURES, "Another autoencoder in place of the model's: a folder, a .safetensors file or its URL."
    )
    preview_decoder: str | None = text(
        None, PICTURES, "A tiny decoder (TAESD) in place of the autoencoder, for previews: places as for --vae."
    )
    lora: Mapping[str, str] = special(
        PICTURES,
        "NAME=PLACE[:SCALE], a LoRA beside the model; may be repeated. Rows, prompts and axes may say other scales.",
        parse_loras,
        default_factory=dict,
        several=True,
    )
    prompt_syntax: str = choice(
        "plain",
        PICTURES,
        "Brackets: plain (text), a1111 (x:1.2) or novelai {x}.",
        PROMPT_SYNTAXES,
        planned=True,
    )
    long_prompts: str = choice(
        "truncate", PICTURES, "Too many tokens: truncate, chunk or error.", LONG_PROMPTS, planned=True
    )
    sweep: Mapping[str, list[Any]] = special(
        PICTURES,
        "AXIS=VALUES, each value with every row; may be repeated. Ranges: seed=0:16, guidance_scale=3..9/5. Texts: "
        "prompt=@FILE, prompt.s/red/{blue,green}/.",
        _sweep,
        default_factory=dict,
        several=True,
    )
    zip: tuple[tuple[str, ...], ...] = special(
        PICTURES,
        "AXIS,AXIS: these axes vary together, value by value; may be repeated.",
        _zip,
        default=(),
        several=True,
    )
    template: str = choice(
        "none",
        PICTURES,
        "Prompts as templates, {a|b}, __name__: dynamic draws one text by each sample's seed, dynamic-all all of them.",
        TEMPLATES,
        planned=True,
    )
    wildcards: str | None = text(None, PICTURES, "Folder or URL of text files: NAME.txt has the lines for __NAME__.")
    num_images: int = parameter("num_images", "Images per row, with seeds s, s+1, ...", 1)
    negative_prompt: str | None = parameter("negative_prompt", "What should not be seen.")
    seed: int = parameter("seed", "First seed; samples count on from it.", 42)
    width: int | None = parameter("width", "Pixels, a multiple of the model's factor.")
    height: int | None = parameter("height", "Pixels, a multiple of the model's factor.")
    num_inference_steps: int | None = parameter("num_inference_steps", "Denoising steps.")
    guidance_scale: float | None = parameter("guidance_scale", "How strongly the prompt counts; 1 is without guidance.")
    sampler: str | None = parameter("sampler", f"One of {', '.join(SAMPLER_CHOICES)}.")
    eta: float | None = parameter("eta", "Noise added while sampling (DDIM), 0 to 1.")
    strength: float | None = parameter(
        "strength", f"How much of a row's image is drawn anew: the share of the steps. {DEFAULT_STRENGTH} if not given."
    )
    safety: str = choice("auto", SAFETY, f"Checker: {', '.join(SAFETY_CHECKERS)}.", SAFETY_CHECKERS, planned=True)
    nsfw_threshold: float = number(0.8, SAFETY, "open-nsfw score that flags a picture.", 1e-6, 1, planned=True)
    on_flagged: str = choice("blank", SAFETY, "Flagged pictures: blank, drop or keep.", ON_FLAGGED, planned=True)
    watermark: str = choice(
        "dwtDctSvd", SAFETY, "Invisible watermark: dwtDctSvd, dwtDct or none.", WATERMARKS, planned=True
    )
    watermark_text: str = special(
        SAFETY, "The watermark's text, up to 32 bytes.", _watermark_text, default="StableDiffusionV1", planned=True
    )
    watermark_policy: str = choice(
        "record",
        SAFETY,
        "A watermark that cannot be read back: record it, require one (the sample fails), or retry by dwtDctSvd first.",
        WATERMARK_POLICIES,
        planned=True,
    )
    chunk_size: int = whole(32, CUTTING, "Samples per chunk, the unit of work and commit.", 1, MAX_CHUNK, planned=True)
    batch_size: int | None = whole(
        None, CUTTING, "Samples per forward pass, always padded.", 1, MAX_CHUNK, planned=True
    )
    dtype: str = choice(
        "auto",
        CUTTING,
        "auto is float16 on a GPU, float32 on a CPU; bfloat16 is faster on a CPU that multiplies it (AMX).",
        DTYPES,
        planned=True,
    )
    device: str = choice("auto", CUTTING, "auto, cpu or cuda.", DEVICES, planned=True)
    execution: str = choice(
        "eager",
        CUTTING,
        "How a GPU runs the model: eager, graphs (the same bits) or compiled (faster, other bits, a slow start).",
        EXECUTIONS,
        planned=True,
    )
    threads_per_actor: int | None = whole(
        None, CUTTING, "CPU threads per model; the pictures' bits depend on it.", 1, 1024, planned=True
    )
    runtime: Runtime = field(default_factory=Runtime)
    dated: DatedOutput | None = None
    is_sample: bool = False


SETTINGS: Mapping[str, Setting] = {**settings_of(JobSpec), **settings_of(Runtime)}
"""Every setting by its name: a key of a job file, and a flag once its underscores are hyphens."""

_RUNTIME = frozenset(settings_of(Runtime))
REMOVED = {"format": "pictures are always files; leave it out"}
"""What to do about a setting that older versions had."""


def make_spec(values: Mapping[str, Any]) -> JobSpec:
    """The job of these settings, flat, each checked. Raises UsageError that names what is wrong with one of them."""
    parsed = {}
    for name, value in values.items():
        if name not in SETTINGS:
            raise UsageError(unknown_setting(name))
        if value is not None:
            parsed[name] = _parsed(name, value)
    if "prompts" not in parsed:
        raise UsageError("no manifest is named; give a file, or a job file with 'prompts'")
    runtime = Runtime(**{name: value for name, value in parsed.items() if name in _RUNTIME})
    spec = JobSpec(**{name: value for name, value in parsed.items() if name not in _RUNTIME}, runtime=runtime)
    _check_together(spec)
    return spec


def unknown_setting(key: Any) -> str:
    """Says that a key is unknown, with the nearest known one."""
    remedy = f"; {REMOVED[key]}" if key in REMOVED else nearest(str(key), SETTINGS)
    return f"unknown key {shorten(key)}{remedy}"


def given_settings(spec: JobSpec) -> dict[str, Any]:
    """The settings that are not left at their defaults, flat, as a job file has them."""
    usual, flat = JobSpec(prompts=()), {}
    for name in SETTINGS:
        holder, default = (spec.runtime, usual.runtime) if name in _RUNTIME else (spec, usual)
        value = getattr(holder, name)
        if value != getattr(default, name):
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _parsed(name: str, value: Any) -> Any:
    try:
        return SETTINGS[name].parse(name, value)
    except FieldError as error:
        raise UsageError(str(error)) from None


def _check_together(spec: JobSpec) -> None:
    build_dimensions(build_axes(spec.sweep), spec.zip)
    if spec.watermark == "none" and spec.watermark_policy != "record":
        raise UsageError(
            f"watermark_policy {spec.watermark_policy!r} asks for a watermark, but watermark is none; "
            f"choose {' or '.join(WATERMARK_METHODS)}, or watermark_policy record"
        )
    for donor in spec.runtime.reuse:
        if place_of(donor) == place_of(spec.out):
            raise UsageError(
                f"reuse {display_url(donor)} is this job's own out; leave it out: the same command resumes by itself"
            )
    if not EXECUTORS[spec.runtime.executor].on_ray and spec.runtime.accelerator_type is not None:
        raise UsageError(
            f"accelerator_type {spec.runtime.accelerator_type} chooses among a cluster's GPUs, but executor is "
            f"{spec.runtime.executor}; leave one of them out"
        )
