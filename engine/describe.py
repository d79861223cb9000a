"""What a model is, found out without torch: for planning, for the plan's hash, to refuse half a folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.folder import read_json
from engine.layout import ModelLayout, find_model
from engine.tokenizer import PromptTokenizer, load_prompt_tokenizer
from engine.types import ModelSpec

__all__ = ["ModelDescription", "describe_layout", "describe_model", "load_tokenizer", "read_json"]


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model at rest.

    `factor` is the number of pixels that every size must be a multiple of; `default_size` is (width, height) in
    pixels; `max_tokens` counts the start and end marks; `files` maps each file that can change a pixel, by its name
    within the model, to its sha256.
    """

    name: str
    path: Path
    family: str
    factor: int
    latent_channels: int
    default_size: tuple[int, int]
    prediction_type: str
    num_train_timesteps: int
    max_tokens: int
    has_safety_checker: bool
    layout: ModelLayout

    @cached_property
    def files(self) -> dict[str, str]:
        """Hashed when first asked for: it reads every byte of the model."""
        return {name: _sha256(path) for name, path in self.layout.files.items()}


def describe_model(model: str | Path | ModelSpec) -> ModelDescription:
    """Read a model's architecture. Raises EngineError that names a missing file or an unsupported switch."""
    return describe_layout(find_model(_spec(model)))


def describe_layout(layout: ModelLayout) -> ModelDescription:
    """The description of a model that has been found."""
    blueprint = layout.blueprint
    side = blueprint.unet.sample_size * blueprint.vae.factor
    path = layout.path.resolve()
    return ModelDescription(
        name=path.stem if layout.single_file else path.name,
        path=layout.path,
        family=blueprint.family,
        factor=blueprint.vae.factor,
        latent_channels=blueprint.vae.unet_channels,
        default_size=(side, side),
        prediction_type=blueprint.scheduler.prediction_type,
        num_train_timesteps=blueprint.scheduler.num_train_timesteps,
        max_tokens=blueprint.max_tokens,
        has_safety_checker=(layout.folder / "safety_checker").is_dir(),
        layout=layout,
    )


def load_tokenizer(model: str | Path | ModelSpec) -> PromptTokenizer:
    """The tokenizer of a model, which is that of its first text encoder."""
    layout = find_model(_spec(model))
    return load_prompt_tokenizer(layout.tokenizers[0], layout.blueprint.towers[0].kind)


def _spec(model: str | Path | ModelSpec) -> ModelSpec:
    return model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
