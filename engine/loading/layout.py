"""Where a model lies and what it is: a diffusers folder, a single file or a hub id as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from latentmill.engine.families.family import TextEncoderSpec
from latentmill.engine.guards.safety import checker_files
from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.checkpoint import open_weights
from latentmill.engine.loading.folder import part_files, pixel_files, read_blueprint, weights_files
from latentmill.engine.loading.hub import fetch_model, fetch_tokenizer, is_hub_id
from latentmill.engine.loading.lora_files import LoraFiles, find_loras
from latentmill.engine.loading.original import as_configured
from latentmill.engine.loading.single_file import held_parts, is_partial, recognise
from latentmill.engine.loading.vae import OtherVae, find_vae
from latentmill.engine.loading.vocabulary import tokenizer_files
from latentmill.engine.types import EngineError, ModelSpec, OriginalModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """A model on disk whose files are all there.

    `weights` gives each component's file (in a single file, the same for all that it holds), `tokenizers` a folder per
    text encoder, `files` everything that can change a pixel, by a name that does not depend on this machine. `original`
    are the components whose weights have the original names. `averaged` takes the running average of the U-Net's
    weights instead of the weights. `loras` are loaded beside them, by name. `vae` takes the place of the model's own
    autoencoder: `blueprint` is then the model's with it, and `own_blueprint` without.
    """

    path: Path
    blueprint: Blueprint
    single_file: bool
    weights: Mapping[str, Path]
    tokenizers: tuple[Path, ...]
    files: Mapping[str, Path]
    original: frozenset[str] = frozenset()
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
    companion = _companion(spec) if is_partial(weights) else None
    blueprint = recognise(weights, spec.prediction_type, None if companion is None else read_blueprint(companion))
    averaged = isinstance(spec, OriginalModelSpec) and spec.use_ema
    if isinstance(spec, OriginalModelSpec):
        blueprint = as_configured(blueprint, weights, spec)
    held = held_parts(weights, blueprint)
    beside = {} if companion is None else weights_files(companion, blueprint, frozenset(blueprint.components) - held)
    tokenizers = tuple(
        _vocabulary(encoder, blueprint.encoders[0], spec.tokenizer)
        if companion is None
        else companion / encoder.tokenizer
        for encoder in blueprint.encoders
    )
    files = {path.name: path}
    for encoder, folder in zip(blueprint.encoders, tokenizers, strict=True):
        # Encoders that share a folder have one entry: that of the first.
        if folder not in tokenizers[: blueprint.encoders.index(encoder)]:
            files |= {f"{encoder.tokenizer}/{file.name}": file for file in tokenizer_files(folder)}
    if companion is not None:
        files |= part_files(companion, beside)
    files |= checker_files(path.parent)
    return ModelLayout(
        path=path,
        blueprint=blueprint,
        single_file=True,
        weights={component: beside.get(component, path) for component in blueprint.components},
        tokenizers=tokenizers,
        files=files,
        original=held,
        averaged=averaged,
    )


def _companion(spec: ModelSpec) -> Path | None:
    """The whole folder that was named as tokenizer, which brings along what a single file has not."""
    if spec.tokenizer is None:
        return None
    folder = Path(spec.tokenizer)
    if not folder.is_dir() and is_hub_id(spec.tokenizer):
        folder = fetch_model(spec.tokenizer, None)
    return folder if (folder / "model_index.json").is_file() else None


def _vocabulary(encoder: TextEncoderSpec, first: TextEncoderSpec, named: str | None) -> Path:
    """The folder of an encoder's tokenizer, for a single file: the one that was named, or the usual one.

    Most users know a model's own folder; its tokenizers lie inside. One that is named by itself is for all encoders of
    the first one's kind.
    """
    if encoder.tokenizer_class != first.tokenizer_class:
        inside = Path(named or "") / encoder.tokenizer
        return inside if named and inside.is_dir() else fetch_tokenizer(encoder.usual_tokenizer)
    name = named or first.usual_tokenizer
    folder = Path(name) if Path(name).is_dir() else fetch_tokenizer(name)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def _with_overrides(blueprint: Blueprint, spec: ModelSpec) -> Blueprint:
    """The caller's prediction type and spacing replace those of the files: single files do not have them."""
    scheduler = blueprint.scheduler.overridden(spec.prediction_type, spec.timestep_spacing)
    return dataclasses.replace(blueprint, scheduler=scheduler)
