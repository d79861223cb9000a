"""What makes two plans the same: every setting that can change a pixel or a row, with its default filled in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axes import Axis, models_of
from latentmill.jobs.manifests.fields import FIELDS, MODEL, Value
from latentmill.jobs.models.choice import ModelDefaults
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.settings import default_of, settings_of
from latentmill.jobs.spec import JobSpec


def default_parameters(spec: JobSpec, defaults: ModelDefaults) -> dict[str, Value]:
    """Each parameter's value for rows and axes that do not give it: flag or job file over preset."""

    def first(given: Value | None, default: Value) -> Value:
        return default if given is None else given

    return {
        "negative_prompt": first(spec.negative_prompt, ""),
        "seed": spec.seed,
        "width": first(spec.width, defaults.width),
        "height": first(spec.height, defaults.height),
        "num_inference_steps": first(spec.num_inference_steps, defaults.num_inference_steps),
        "guidance_scale": first(spec.guidance_scale, defaults.guidance_scale),
        "sampler": first(spec.sampler, defaults.sampler),
        "eta": first(spec.eta, 0.0),
        "num_images": spec.num_images,
    }


def plan_identity(
    spec: JobSpec,
    models: Sequence[ResolvedModel],
    parameters: Mapping[str, Value],
    axes: tuple[Axis, ...],
    digest: str,
    batch_size: int,
    several: bool,
    zips: list[list[str]],
    wildcards: str | None,
) -> dict[str, Any]:
    """All that can change a pixel or a row, and nothing else.

    `several`: rows or an axis name the models. `zips` names the axes that vary together; `wildcards` is the digest of
    those that are used.
    """
    named = models_of(axes)
    later: dict[str, Any] = {"zip": zips, "wildcards": wildcards, "loras": dict(models[0].lora_scales)}
    if several:
        later["models"] = list(map(_of_model, models))
    return {
        **_of_model(models[0]),
        "parameters": dict(parameters),
        "axes": [
            # models count for what they are, and not for how they were named
            [axis.name, [named.index(str(value)) for value in axis.values] if axis.name == MODEL else list(axis.values)]
            for axis in axes
        ],
        "manifest": digest,
        **_planned_settings(spec, batch_size),
        **{name: value for name, value in later.items() if value},
    }


def _of_model(model: ResolvedModel) -> dict[str, Any]:
    return {
        "model_files": dict(sorted(model.files.items())),
        "prediction_type": model.predicts,
        "timestep_spacing": model.spacing,
    }


def in_words_of(begun: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as an output has it that was begun before there were some of the settings.

    What it does not know is left out where it has its default: that is what the output was made with. So a setting may
    be added without a word about older outputs.
    """
    defaults = {name: default_of(JobSpec, name) for name, setting in settings_of(JobSpec).items() if setting.planned}
    return {
        name: value
        for name, value in identity.items()
        if name in begun or name not in defaults or value != defaults[name]
    }


def _planned_settings(spec: JobSpec, batch_size: int) -> dict[str, Any]:
    """The settings that are part of the plan, what is computed filled in, and without what has no effect."""
    device = _resolve_device(spec)
    if spec.dtype == "float16" and device == "cpu":
        raise UsageError("dtype float16 does not run on cpu; use float32 or bfloat16, or device cuda")
    if spec.execution != "eager" and device == "cpu":
        raise UsageError(f"execution {spec.execution} does not run on cpu; use eager, or device cuda")
    computed = {
        "batch_size": batch_size,
        "device": device,
        "dtype": spec.dtype if spec.dtype != "auto" else "float16" if device == "cuda" else "float32",
        "threads_per_actor": _resolve_threads(spec),
    }
    idle: dict[str, Any] = {"nsfw_threshold": None} if spec.safety == "none" else {}
    idle |= {"watermark_text": ""} if spec.watermark == "none" else {}
    planned = {name: getattr(spec, name) for name, setting in settings_of(JobSpec).items() if setting.planned}
    return {name: value for name, value in (planned | computed | idle).items() if name not in FIELDS}


def _resolve_device(spec: JobSpec) -> str:
    """`auto` is cuda where actors are given GPUs or this machine has one. Torch is asked only if a driver is there."""
    if spec.device != "auto":
        return spec.device
    if spec.runtime.gpus_per_actor is not None:
        return "cuda" if spec.runtime.gpus_per_actor > 0 else "cpu"
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve_threads(spec: JobSpec) -> int:
    """Threads change bits, so they are planned: one, for one actor per core, unless the number of actors is given.

    One thread by default, whatever the machine and the executor, makes the same job the same plan everywhere.
    """
    if spec.threads_per_actor is not None:
        return spec.threads_per_actor
    if spec.runtime.num_actors is None:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // spec.runtime.num_actors)
