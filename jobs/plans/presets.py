"""Models by name or place: configs/models/*.yaml gives each preset its place and the parameters that suit it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from engine import EMBEDDED_MODEL, EngineError, ModelDescription, ModelSpec, describe_model
from jobs.errors import UsageError
from jobs.manifests.fields import nearest, shorten

FALLBACK_STEPS = 50
FALLBACK_GUIDANCE = 7.5
FALLBACK_BATCH = 4
"""What a bare folder gets, beside the first sampler that it takes: the published defaults of Stable Diffusion, and a
batch that fits a small GPU."""

_WEIGHTS = (".safetensors", ".ckpt", ".bin")


class ModelPreset(BaseModel):
    """One file of configs/models. `path` is `embedded` for the model in the package, else a place as --model takes it.

    `revision` is the commit of a hub id; the three after it are for what a model's own files do not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    path: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    batch_size: int
    revision: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """What a job says of its model. `source`: a preset, a folder, a single file, a hub id, or PRESET=PLACE."""

    source: str
    revision: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    timestep_spacing: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model that exists and is whole, and what it implies for a job.

    `source` is what the user named; it stays valid on another machine, where the files may lie elsewhere. `revision` is
    the commit that a hub id stood for. The next three are as `ModelSpec` takes them, the two after them what came of
    them. `files` maps each file that can change a pixel to its sha256.
    """

    source: str
    revision: str | None
    tokenizer: str | None
    prediction_type: str | None
    timestep_spacing: str | None
    predicts: str
    spacing: str
    name: str
    family: str
    factor: int
    latent_channels: int
    max_tokens: int | None
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One hash over all the files' names and hashes."""
        listing = "".join(f"{self.files[name]}  {name}\n" for name in sorted(self.files))
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def weights_digest(self) -> str:
        """The sha256 of the single file, or of the denoiser's weights: what web UIs call the model's hash."""
        single_file = (digest for path, digest in self.files.items() if "/" not in path and path.endswith(_WEIGHTS))
        denoiser = (
            digest
            for path, digest in self.files.items()
            if path.startswith(("unet/", "transformer/")) and path.endswith(_WEIGHTS)
        )
        return next(single_file, next(denoiser, ""))

    @property
    def spec(self) -> ModelSpec:
        """The model as the engine finds it on this machine."""
        return ModelSpec(
            model=model_place(self.source),
            revision=self.revision,
            tokenizer=self.tokenizer,
            prediction_type=self.prediction_type,
            timestep_spacing=self.timestep_spacing,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDefaults:
    """Parameters for whatever neither axis, row, flag nor job file says."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    batch_size: int


def list_presets() -> dict[str, ModelPreset]:
    """All presets by name, sorted."""
    folder = Path(__file__).parents[2] / "configs" / "models"  # importlib.resources fails on it in an editable install
    presets = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            presets[entry.name.removesuffix(".yaml")] = ModelPreset.model_validate(
                yaml.safe_load(entry.read_text(encoding="utf-8"))
            )
    return presets


def model_place(source: str) -> str:
    """What the engine takes for a preset, PRESET=PLACE or a place: an absolute path, or a hub id."""
    preset, place = _split(source)
    if place is None:
        assert preset is not None  # noqa: S101 - _split gives one of the two
        place = str(EMBEDDED_MODEL) if preset.path == "embedded" else preset.path
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


def _split(source: str) -> tuple[ModelPreset | None, str | None]:
    """The preset that is named, if one is, and the place that is, if one is."""
    presets = list_presets()
    if source in presets:
        return presets[source], None
    name, equals, place = source.partition("=")
    if equals and place and name in presets:
        return presets[name], place
    return None, source


def resolve_model(choice: ModelChoice) -> tuple[ResolvedModel, ModelDefaults, ModelDescription]:
    """Find, read and hash the model without loading it. Raises UsageError for an unknown or incomplete one."""
    preset, place = _split(choice.source)
    spec = _model_spec(choice, preset, own_place=place is None)
    try:
        described = describe_model(spec)
        files = dict(described.files)
    except (EngineError, OSError) as error:
        raise UsageError(_not_a_model(choice.source, spec.model, error)) from None
    name, _, _ = choice.source.partition("=")
    # A commit in place of a branch: it means the same files for ever.
    commit = described.path.name if described.path.parent.name == "snapshots" else spec.revision
    model = ResolvedModel(
        source=choice.source if preset else spec.model,
        revision=None if Path(spec.model).exists() else commit,
        tokenizer=spec.tokenizer,
        prediction_type=spec.prediction_type,
        timestep_spacing=spec.timestep_spacing,
        predicts=described.prediction_type,
        spacing=described.timestep_spacing,
        name=name if preset else described.name,
        family=described.family,
        factor=described.factor,
        latent_channels=described.latent_channels,
        max_tokens=described.max_tokens,
        files=files,
    )
    return model, _defaults(preset, described), described


def _model_spec(choice: ModelChoice, preset: ModelPreset | None, *, own_place: bool) -> ModelSpec:
    """Flags over the preset; a preset's revision belongs to its own place only."""
    model = model_place(choice.source)
    local = Path(model).exists()
    if choice.revision is not None and local:
        raise UsageError(f"revision {shorten(choice.revision)} has no meaning for a local model; leave it out")
    # A preset's tokenizer is for a single file; a folder has its own.
    tokenizer = choice.tokenizer or (preset.tokenizer if preset and Path(model).is_file() else None)
    if tokenizer is not None and Path(tokenizer).expanduser().exists():
        tokenizer = str(Path(tokenizer).expanduser().absolute())
    return ModelSpec(
        model=model,
        revision=choice.revision or (preset.revision if preset and own_place else None),
        tokenizer=tokenizer,
        prediction_type=choice.prediction_type or (preset.prediction_type if preset else None),
        timestep_spacing=choice.timestep_spacing or (preset.timestep_spacing if preset else None),
    )


def _not_a_model(source: str, place: str, error: Exception) -> str:
    presets = list_presets()
    if Path(place).exists() or "/" in source or source in presets:
        return f"model {shorten(source)}: {' '.join(str(error).split())}"
    return (
        f"model {shorten(source)} is neither a preset{nearest(source, presets)} nor a folder, a .safetensors or .ckpt "
        f"file or a hub id (owner/name); presets: {', '.join(presets)}"
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
