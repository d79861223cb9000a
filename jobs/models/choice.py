"""From a job's choice of a model to the model itself, with the parameters that suit it; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from latentmill.engine import EngineError, LoraSpec, ModelDescription, ModelSpec, describe_model
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.fields import nearest, shorten
from latentmill.jobs.manifests.loras import split_place
from latentmill.jobs.models.cache import is_single_file, is_url
from latentmill.jobs.models.digests import file_digests
from latentmill.jobs.models.place import place_newest
from latentmill.jobs.models.presets import ModelPreset, list_presets, model_place, split_source
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.store.urls import display_url

FALLBACK_STEPS = 50
FALLBACK_GUIDANCE = 7.5
FALLBACK_BATCH = 4
"""Defaults of a model without a preset: those published for Stable Diffusion, and a batch that fits a small GPU.
Its sampler is the first that it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """A job's choice of a model. `source`: a preset, a folder, a single file, a URL, a hub id, or PRESET=PLACE.

    `loras` gives each LoRA's name its place, with a scale behind it. `vae` and `preview_decoder` are places, too.
    """

    source: str
    revision: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    loras: Mapping[str, str] = field(default_factory=dict, hash=False)
    vae: str | None = None
    preview_decoder: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDefaults:
    """Parameters that neither axis, row, flag nor job file gives."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    batch_size: int


def resolve_model(choice: ModelChoice) -> tuple[ResolvedModel, ModelDefaults, ModelDescription]:
    """Find, read and hash the model without loading it. Raises UsageError for an unknown or incomplete one."""
    preset, place = split_source(choice.source)
    spec = local = _model_spec(choice, preset, own_place=place is None)
    try:
        spec, local = place_newest(spec)
        described = describe_model(local)
        if local.loras:
            from latentmill.engine import check_loras  # with torch, which no other plan needs

            check_loras(local)
        files = file_digests(described.paths)
    except (EngineError, JobError, OSError) as error:
        raise UsageError(_not_a_model(choice.source, spec.model, str(error).replace(local.model, spec.model))) from None
    name, _, _ = choice.source.partition("=")
    # a commit in place of a branch: its files never change
    commit = described.path.name if described.path.parent.name == "snapshots" else spec.revision
    is_local = Path(spec.model).exists()
    model = ResolvedModel(
        source=choice.source if preset else spec.model,
        revision=None if is_local else commit,
        tokenizer=spec.tokenizer,
        prediction_type=spec.prediction_type,
        timestep_spacing=spec.timestep_spacing,
        predicts=described.prediction_type,
        spacing=described.timestep_spacing,
        name=name if preset else described.name if is_local else _last_part(spec.model),
        family=described.family,
        factor=described.factor,
        latent_channels=described.latent_channels,
        max_tokens=described.max_tokens,
        files=files,
        license=preset.license if preset and place is None else None,
        loras={lora.name: lora.path for lora in spec.loras},
        lora_scales={name: split_place(text)[1] for name, text in choice.loras.items()},
        vae=spec.vae,
        preview_decoder=spec.preview_decoder,
    )
    return model, _defaults(preset, described), described


def _model_spec(choice: ModelChoice, preset: ModelPreset | None, *, own_place: bool) -> ModelSpec:
    """Flags over the preset; a preset's revision applies to its own place only."""
    model = model_place(choice.source)
    loras = {name: split_place(text)[0] for name, text in choice.loras.items()}
    for place in (model, choice.tokenizer or "", *loras.values(), choice.vae or "", choice.preview_decoder or ""):
        if is_url(place) and display_url(place) != place:
            raise UsageError(
                f"{display_url(place)} carries a user or a query; give the plain address, and credentials by "
                f"environment or profile"
            )
    if choice.revision is not None and (is_url(model) or Path(model).exists()):
        kind = "model at a URL" if is_url(model) else "local model"
        raise UsageError(f"revision {shorten(choice.revision)} has no meaning for a {kind}; leave it out")
    # A preset's tokenizer is for a single file; a folder has its own.
    single = is_single_file(model) if is_url(model) else Path(model).is_file()
    tokenizer = choice.tokenizer or (preset.tokenizer if preset and single else None)
    if tokenizer is not None and Path(tokenizer).expanduser().exists():
        tokenizer = str(Path(tokenizer).expanduser().absolute())
    return ModelSpec(
        model=model,
        revision=choice.revision or (preset.revision if preset and own_place else None),
        tokenizer=tokenizer,
        prediction_type=choice.prediction_type or (preset.prediction_type if preset else None),
        timestep_spacing=choice.timestep_spacing or (preset.timestep_spacing if preset else None),
        loras=tuple(LoraSpec(name=name, path=_absolute(place)) for name, place in loras.items()),
        vae=None if choice.vae is None else _absolute(choice.vae),
        preview_decoder=None if choice.preview_decoder is None else _absolute(choice.preview_decoder),
    )


def _absolute(place: str) -> str:
    """A place on this machine by its whole path; any other as it is."""
    path = Path(place.removeprefix("file://")).expanduser()
    return str(path.absolute()) if path.exists() else place


def _last_part(place: str) -> str:
    """The model's name in a URL or a hub id."""
    name = PurePosixPath(place).name
    return PurePosixPath(name).stem if is_single_file(name) else name


def _not_a_model(source: str, place: str, fault: str) -> str:
    presets = list_presets()
    if Path(place).exists() or "/" in source or source in presets:
        return f"model {shorten(source)}: {' '.join(fault.split())}"
    return (
        f"model {shorten(source)} is neither a preset{nearest(source, presets)} nor a folder, a .safetensors or .ckpt "
        f"file, a URL of one of them (s3://...) or a hub id (owner/name); presets: {', '.join(presets)}"
    )


def _defaults(preset: ModelPreset | None, described: ModelDescription) -> ModelDefaults:
    if preset is not None:
        return ModelDefaults(
            width=preset.width,
            height=preset.height,
            num_inference_steps=preset.num_inference_steps,
            guidance_scale=preset.guidance_scale,
            sampler=preset.sampler,
            batch_size=preset.batch_size,
        )
    width, height = described.default_size
    return ModelDefaults(
        width=width,
        height=height,
        num_inference_steps=FALLBACK_STEPS,
        guidance_scale=FALLBACK_GUIDANCE,
        sampler=described.samplers[0],
        batch_size=FALLBACK_BATCH,
    )
