"""What a model is, without torch: for planning, for the plan's hash, and to refuse an incomplete folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from latentmill.engine.diffusers_backend.folder import DiffusersFolder, find_pipeline, load_first_tokenizer
from latentmill.engine.guards.safety import choose_checker
from latentmill.engine.loading.files import read_json
from latentmill.engine.loading.hub import fetch_model, is_hub_id
from latentmill.engine.loading.layout import ModelLayout, find_model
from latentmill.engine.loading.tiny_config import TinyDecoderConfig
from latentmill.engine.sampling.levels import check_steps
from latentmill.engine.sampling.table import FLOW_SAMPLERS, FOLDER_SAMPLER, SAMPLERS
from latentmill.engine.text.tokenizer import load_prompt_tokenizer
from latentmill.engine.types import EngineError, ModelSpec

__all__ = ["ModelDescription", "TokenCounts", "describe_layout", "describe_model", "load_tokenizer", "read_json"]


class TokenCounts(Protocol):
    """What planning asks of a tokenizer."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, start and end marks not included."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model on disk.

    `factor` is the number of pixels that every size must be a multiple of; `default_size` is (width, height) in
    pixels, and no side may be longer than `max_side`; `samplers` are the names that it takes, the usual one first;
    `max_tokens` counts a start and an end mark, and is None if the files do not say. `paths` names everything that can
    change a pixel. A model that the engine runs itself has its architecture in `layout`; one that the library diffusers
    runs is in `pipeline`.
    """

    name: str
    path: Path
    family: str
    factor: int
    latent_channels: int
    default_size: tuple[int, int]
    prediction_type: str
    timestep_spacing: str
    num_train_timesteps: int
    samplers: tuple[str, ...]
    max_tokens: int | None
    folder: Path
    paths: Mapping[str, Path]
    max_side: int | None = None
    pipeline: DiffusersFolder | None = None
    own_layout: ModelLayout | None = None

    @cached_property
    def files(self) -> dict[str, str]:
        """Each file of `paths` by its sha256. Hashed when first asked for: it reads every byte of the model."""
        return {name: _sha256(path) for name, path in self.paths.items()}

    @property
    def layout(self) -> ModelLayout:
        """Where its parts lie, and their architecture. Raises EngineError for a pipeline of diffusers."""
        if self.own_layout is None:
            raise EngineError(f"{self.name} is a {self.family}: it has no U-Net of latent diffusion")
        return self.own_layout

    def check_steps(self, sampler: str, steps: int) -> None:
        """Raises EngineError for a sampler that the model does not take, and for a number of steps that it cannot."""
        if sampler not in self.samplers:
            why = f": {self.family} samples by its folder's own scheduler" if self.own_layout is None else ""
            raise EngineError(f"sampler {sampler!r} is not one of {', '.join(self.samplers)}{why}")
        if self.own_layout is not None:
            check_steps(sampler, self.own_layout.blueprint.scheduler, steps)
        elif not 1 <= steps <= self.num_train_timesteps:
            raise EngineError(f"num_inference_steps is {steps}; this model takes 1 to {self.num_train_timesteps}")

    def check_images(self) -> None:
        """Raises EngineError for a model whose pictures come from prompts alone."""
        why = None
        if self.pipeline is not None:
            why = "runs by the library diffusers"
        elif isinstance(self.layout.blueprint.autoencoder, TinyDecoderConfig):
            why = "has a decoder for previews, which encodes no image"
        if why is not None:
            raise EngineError(f"{self.name} {why}; here it draws from prompts alone")

    def check_safety(self, safety: str) -> None:
        """Raises EngineError for a safety checker that the model does not bring along, though it would have to."""
        choose_checker(safety, self.folder)

    def check_prompts(self, prompt_syntax: str, long_prompts: str) -> None:
        """Raises EngineError for a way of reading prompts that the model's text encoders cannot be asked for."""
        own = self.own_layout
        plain_only = own is not None and own.blueprint.family.plain_prompts
        if plain_only and (prompt_syntax != "plain" or long_prompts == "chunk"):
            raise EngineError(
                f"prompt_syntax is {prompt_syntax!r} and long_prompts {long_prompts!r}, but the text encoders of "
                f"{self.family} take no weights and no chunks; use plain, and truncate or error"
            )
        if self.pipeline is not None and (prompt_syntax, long_prompts) != ("plain", "truncate"):
            raise EngineError(
                f"prompt_syntax is {prompt_syntax!r} and long_prompts {long_prompts!r}, but a {self.family} reads "
                "prompts its own way; use plain and truncate"
            )

    def check_execution(self, execution: str) -> None:
        """Raises EngineError for a way of running the denoiser that is not there for this model."""
        if self.pipeline is not None and execution != "eager":
            raise EngineError(
                f"execution is {execution!r}, but a {self.family} is run by the library diffusers; use eager"
            )


def describe_model(model: str | Path | ModelSpec) -> ModelDescription:
    """Read a model's architecture. Raises EngineError that names a missing file or an unsupported switch."""
    spec = _local_spec(model)
    pipeline = find_pipeline(spec)
    if pipeline is None:
        return describe_layout(find_model(spec))
    if spec.loras or spec.vae or spec.preview_decoder:
        raise EngineError(
            f"{spec.model} is a {pipeline.class_name}, which runs by the library diffusers and takes neither LoRA nor "
            "another autoencoder here; leave them out"
        )
    return _describe_pipeline(pipeline)


def describe_layout(layout: ModelLayout) -> ModelDescription:
    """The description of a model that has been found."""
    blueprint = layout.blueprint
    cell, limit = blueprint.autoencoder.factor, blueprint.denoiser.side_limit
    side = blueprint.denoiser.sample_size * cell
    path = layout.path.resolve()
    return ModelDescription(
        name=path.stem if layout.single_file else path.name,
        path=layout.path,
        family=blueprint.family.name,
        factor=blueprint.factor,
        latent_channels=blueprint.autoencoder.denoiser_channels,
        default_size=(side, side),
        prediction_type=blueprint.scheduler.prediction_type,
        timestep_spacing=blueprint.scheduler.timestep_spacing,
        num_train_timesteps=blueprint.scheduler.num_train_timesteps,
        samplers=SAMPLERS if blueprint.scheduler.flow is None else FLOW_SAMPLERS,
        max_tokens=blueprint.max_tokens,
        folder=layout.folder,
        paths=layout.files,
        max_side=None if limit is None else limit * cell,
        own_layout=layout,
    )


def load_tokenizer(model: str | Path | ModelSpec) -> TokenCounts:
    """The tokenizer of a model: that of the text encoder which takes most of a prompt, the first of them."""
    spec = _local_spec(model)
    pipeline = find_pipeline(spec)
    if pipeline is not None:
        return load_first_tokenizer(pipeline)
    layout = find_model(spec)
    reader = layout.blueprint.reader
    return load_prompt_tokenizer(layout.tokenizers[reader], layout.blueprint.encoders[reader])


def _describe_pipeline(pipeline: DiffusersFolder) -> ModelDescription:
    return ModelDescription(
        name=pipeline.path.resolve().name,
        path=pipeline.path,
        family=pipeline.class_name,
        factor=pipeline.factor,
        latent_channels=pipeline.latent_channels,
        default_size=pipeline.default_size,
        prediction_type=pipeline.prediction_type,
        timestep_spacing=str(pipeline.scheduler.get("timestep_spacing", FOLDER_SAMPLER)),
        num_train_timesteps=int(pipeline.scheduler.get("num_train_timesteps", 1000)),
        samplers=(FOLDER_SAMPLER,),
        # The pipeline's code knows it, and not its files: a tokenizer often takes more than the pipeline lets it.
        max_tokens=None,
        folder=pipeline.path,
        paths=pipeline.files,
        pipeline=pipeline,
    )


def _local_spec(model: str | Path | ModelSpec) -> ModelSpec:
    """The same model on this machine: a hub id becomes its snapshot."""
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
    if Path(spec.model).exists() or not is_hub_id(spec.model):
        return spec
    return replace(spec, model=str(fetch_model(spec.model, spec.revision)), revision=None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
