"""Named models: configs/models/*.yaml gives each a folder and the parameters that suit it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from engine import EMBEDDED_MODEL, EngineError, ModelDescription, describe_model
from jobs.errors import UsageError
from jobs.fields import nearest, shorten

FALLBACK_STEPS = 50
FALLBACK_GUIDANCE = 7.5
FALLBACK_SAMPLER = "ddim"
FALLBACK_BATCH = 4
"""What a bare folder gets: the published defaults of Stable Diffusion, and a batch that fits a small GPU."""


class ModelPreset(BaseModel):
    """One file of configs/models. `path` is `embedded` for the model in the package, else a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    path: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model folder that exists and is whole, and what it implies for a job.

    `source` is what the user named; it stays valid on another machine, where `folder` may lie elsewhere. `files` maps
    each file that can change a pixel to its sha256.
    """

    source: str
    name: str
    family: str
    factor: int
    latent_channels: int
    max_tokens: int
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One hash over all the files' names and hashes."""
        listing = "".join(f"{self.files[name]}  {name}\n" for name in sorted(self.files))
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Where the model lies on this machine."""
        return model_folder(self.source)

    @property
    def path(self) -> str:
        """`folder` as text, as `ModelSpec.model` takes it."""
        return str(self.folder)


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
    folder = Path(__file__).parents[1] / "configs" / "models"  # importlib.resources fails on it in an editable install
    presets = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            presets[entry.name.removesuffix(".yaml")] = ModelPreset.model_validate(
                yaml.safe_load(entry.read_text(encoding="utf-8"))
            )
    return presets


def model_folder(source: str) -> Path:
    """The folder of a preset or path on this machine. Raises UsageError, with the nearest preset, if there is none."""
    presets = list_presets()
    preset = presets.get(source)
    if preset is not None:
        return EMBEDDED_MODEL if preset.path == "embedded" else Path(preset.path).expanduser()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.is_file():
        raise UsageError(
            f"model {shorten(source)} is a file; give a diffusers model folder or a preset: {', '.join(presets)}"
        )
    raise UsageError(
        f"model {shorten(source)} is neither a preset{nearest(source, presets)} nor a folder; "
        f"presets: {', '.join(presets)}; any other model must be a local diffusers folder"
    )


def resolve_model(source: str, revision: str | None) -> tuple[ResolvedModel, ModelDefaults, ModelDescription]:
    """Find, read and hash the model without loading it. Raises UsageError for an unknown or incomplete one."""
    if revision is not None:
        raise UsageError(f"revision {shorten(revision)} has no meaning for a local model folder; leave it out")
    folder = model_folder(source)
    preset = list_presets().get(source)
    try:
        described = describe_model(folder)
    except EngineError as error:
        raise UsageError(f"model {shorten(source)}: {error}") from None
    width, height = described.default_size
    defaults = ModelDefaults(
        width=preset.width if preset else width,
        height=preset.height if preset else height,
        num_inference_steps=preset.num_inference_steps if preset else FALLBACK_STEPS,
        guidance_scale=preset.guidance_scale if preset else FALLBACK_GUIDANCE,
        sampler=preset.sampler if preset else FALLBACK_SAMPLER,
        batch_size=preset.batch_size if preset else FALLBACK_BATCH,
    )
    model = ResolvedModel(
        source=source if preset else str(folder),
        name=source if preset else described.name,
        family=described.family,
        factor=described.factor,
        latent_channels=described.latent_channels,
        max_tokens=described.max_tokens,
        files=dict(described.files),
    )
    return model, defaults, described
