"""Where a model lies and what it is: a diffusers folder, a single file or a hub id as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentmill.engine.guards.safety import checker_files
from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.checkpoint import open_weights
from latentmill.engine.loading.config import SchedulerConfig
from latentmill.engine.loading.folder import pixel_files, read_blueprint, weights_files
from latentmill.engine.loading.hub import fetch_model, fetch_tokenizer, is_hub_id
from latentmill.engine.loading.lora_files import LoraFiles, find_loras
from latentmill.engine.loading.original import as_configured
from latentmill.engine.loading.single_file import recognise
from latentmill.engine.loading.vae import OtherVae, find_vae
from latentmill.engine.loading.vocabulary import tokenizer_files
from latentmill.engine.types import EngineError, ModelSpec, OriginalModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """A model on disk whose files are all there.

    `weights` gives each component's file (in a single file, the same for all), `tokenizers` a folder per text encoder,
    `files` everything that can change a pixel, by a name that does not depend on this machine. `averaged` takes the
    running average of the U-Net's weights instead of the weights. `loras` are loaded beside them, by name. `vae` takes
    the place of the model's own autoencoder: `blueprint` is then the model's with it, and `own_blueprint` without.
    """

    path: Path
    blueprint: Blueprint
    single_file: bool
    weights: Mapping[str, Path]
    tokenizers: tuple[Path, ...]
    files: Mapping[str, Path]
    averaged: bool = False
    loras: Mapping[str, LoraFiles] = field(default_factory=dict)
    vae: OtherVae | None = None
    own_blueprint: Blueprint | None = None

    @property
    def folder(self) -> Path:
        """The folder with the other files of the model, such as a safety checker."""
        return self.path.parent if self.single_file else self.path


def find_model(spec: ModelSpec) -> ModelLayout:
    """Find a model and read its architecture. Raises EngineError that names what is missing or not supported."""
    path = Path(spec.model)
    if path.is_file():
        layout = _single_file(path, spec)
    elif path.is_dir():
        layout = _folder(path, spec)
    elif path.exists():
        raise EngineError(f"model {path} is a pipe or a device; give a folder or a regular file")
    elif is_hub_id(spec.model):
        layout = _folder(fetch_model(spec.model, spec.revision), spec)
    else:
        raise EngineError(
            f"model {spec.model} does not exist; give a local diffusers folder, a .safetensors or .ckpt file, or a hub "
            "id (owner/name)"
        )
    loras = find_loras(spec.loras)
    files = {**layout.files, **{name: path for lora in loras.values() for name, path in lora.files.items()}}
    layout = dataclasses.replace(layout, blueprint=_with_overrides(layout.blueprint, spec), files=files, loras=loras)
    return _with_vae(layout, spec) if spec.vae or spec.preview_decoder else layout


def _with_vae(layout: ModelLayout, spec: ModelSpec) -> ModelLayout:
    """The model with another autoencoder, whose files count instead of its own where those are files of their own."""
    if spec.vae and spec.preview_decoder:
        raise EngineError("an autoencoder and a decoder for previews are both named; use one of them")
    vae = find_vae(str(spec.vae or spec.preview_decoder), layout.blueprint, tiny=spec.vae is None)
    own = layout.blueprint.family.autoencoder.component
    kept = {name: path for name, path in layout.files.items() if not name.startswith(f"{own}/")}
    return dataclasses.replace(
        layout,
        blueprint=vae.blueprint,
        own_blueprint=layout.blueprint,
        weights={**layout.weights, vae.blueprint.family.autoencoder.component: vae.weights},
        files={**kept, **vae.files},
        vae=vae,
    )


def _folder(path: Path, spec: ModelSpec) -> ModelLayout:
    if spec.tokenizer is not None:
        raise EngineError(f"tokenizer is {spec.tokenizer!r}, but the folder {path} has its own; leave it out")
    blueprint = read_blueprint(path)
    files = pixel_files(path, blueprint)
    return ModelLayout(
        path=path,
        blueprint=blueprint,
        single_file=False,
        weights=weights_files(path, blueprint),
        tokenizers=tuple(path / encoder.tokenizer for encoder in blueprint.encoders),
        files=files,
    )


def _single_file(path: Path, spec: ModelSpec) -> ModelLayout:
    weights = open_weights(path)
    blueprint = recognise(weights, spec.prediction_type)
    averaged = isinstance(spec, OriginalModelSpec) and spec.use_ema
    if isinstance(spec, OriginalModelSpec):
        blueprint = as_configured(blueprint, weights, spec)
    name = spec.tokenizer or blueprint.encoders[0].usual_tokenizer
    tokenizer = Path(name) if Path(name).is_dir() else fetch_tokenizer(name)
    # Most users know a model's own folder; its tokenizer lies inside.
    if (tokenizer / "tokenizer").is_dir():
        tokenizer /= "tokenizer"
    files = {path.name: path}
    files |= {f"tokenizer/{file.name}": file for file in tokenizer_files(tokenizer)}
    files |= checker_files(path.parent)
    return ModelLayout(
        path=path,
        blueprint=blueprint,
        single_file=True,
        weights=dict.fromkeys(blueprint.components, path),
        tokenizers=(tokenizer,) * len(blueprint.encoders),
        files=files,
        averaged=averaged,
    )


def _with_overrides(blueprint: Blueprint, spec: ModelSpec) -> Blueprint:
    """The caller's prediction type and spacing replace those of the files: single files do not have them."""
    changes: dict[str, Any] = {
        name: value
        for name, value in (
            ("prediction_type", spec.prediction_type),
            ("timestep_spacing", spec.timestep_spacing),
        )
        if value is not None
    }
    SchedulerConfig.from_dict(changes)  # refuses an unknown name
    return dataclasses.replace(blueprint, scheduler=dataclasses.replace(blueprint.scheduler, **changes))
