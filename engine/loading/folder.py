"""The diffusers folder layout: which file holds what, read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmill.engine.loading.blueprint import Blueprint, Family, Tower, check_fit
from latentmill.engine.loading.config import SchedulerConfig, UNetConfig, VAEConfig
from latentmill.engine.types import EngineError

_DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pipeline:
    family: Family
    vae_component: str
    towers: tuple[tuple[str, str], ...]


_LDM = _Pipeline(family="latent-diffusion", vae_component="vqvae", towers=(("bert", "tokenizer"),))
_PIPELINES = {
    "StableDiffusionPipeline": _Pipeline(
        family="stable-diffusion", vae_component="vae", towers=(("text_encoder", "tokenizer"),)
    ),
    "StableDiffusionXLPipeline": _Pipeline(
        family="stable-diffusion-xl",
        vae_component="vae",
        towers=(("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    ),
    "LDMTextToImagePipeline": _LDM,
    "LatentDiffusionPipeline": _LDM,
}

OWN_PIPELINES = tuple(_PIPELINES)
"""The pipelines that the engine runs itself, by their class's name in model_index.json."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises EngineError if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path} is missing: the folder is not a whole diffusers model folder") from None
    except (ValueError, OSError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content


def read_blueprint(folder: Path) -> Blueprint:
    """The architecture that a folder's JSON files describe. Raises EngineError that names what is not supported."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    pipeline = _PIPELINES.get(name) if isinstance(name, str) else None
    if pipeline is None:
        raise EngineError(
            f"{folder}/model_index.json names the pipeline {name!r}; this version loads {', '.join(_PIPELINES)}"
        )
    blueprint = Blueprint(
        family=pipeline.family,
        unet=UNetConfig.from_dict(read_json(folder / "unet" / "config.json")),
        vae=VAEConfig.from_dict(read_json(folder / pipeline.vae_component / "config.json")),
        scheduler=SchedulerConfig.from_dict(read_json(folder / "scheduler" / "scheduler_config.json")),
        towers=tuple(_tower(folder, pipeline.family, *names) for names in pipeline.towers),
        vae_component=pipeline.vae_component,
        force_zeros_for_empty_prompt=(
            pipeline.family == "stable-diffusion-xl" and bool(index.get("force_zeros_for_empty_prompt", True))
        ),
    )
    check_fit(blueprint, folder)
    return blueprint


def pipeline_parts(index: Path) -> tuple[str, ...]:
    """The parts of a pipeline that is none of OWN_PIPELINES, by its model_index.json; none for any other."""
    content = read_json(index)
    if not isinstance(content.get("_class_name"), str) or content["_class_name"] in OWN_PIPELINES:
        return ()
    return tuple(
        part for part, entry in content.items() if isinstance(entry, list) and len(entry) == 2 and None not in entry
    )


def weights_file(folder: Path, component: str) -> Path:
    """The component's weights: safetensors where there are any. Raises EngineError that names what was looked for."""
    names = _DIFFUSERS_WEIGHTS if component in ("unet", "vae", "vqvae") else _TRANSFORMERS_WEIGHTS
    for name in names:
        if (folder / component / name).is_file():
            return folder / component / name
    raise EngineError(f"{folder / component} has no weights: looked for {', '.join(names)}")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder that can change a token. Raises EngineError where there is no vocabulary."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise EngineError(f"{folder} is missing or empty: looked for {', '.join(_TOKENIZER_FILES)}")
    return files


def pixel_files(folder: Path, blueprint: Blueprint) -> dict[str, Path]:
    """All files that can change a pixel or a verdict, by relative path, sorted. Raises EngineError for a gap."""
    paths = [folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"]
    for tower in blueprint.towers:
        paths += tokenizer_files(folder / tower.tokenizer)
    for component in blueprint.components:
        paths += [folder / component / "config.json", weights_file(folder, component)]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return dict(sorted((files | checker_files(folder)).items()))


def checker_files(folder: Path) -> dict[str, Path]:
    """The files of a folder's own safety checker, which can change a verdict, by relative path; none if it has none."""
    paths = [path for path in sorted((folder / "safety_checker").glob("*")) if path.is_file()]
    processor = folder / "feature_extractor" / "preprocessor_config.json"
    if paths and processor.is_file():
        paths.append(processor)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _tower(folder: Path, family: Family, component: str, tokenizer: str) -> Tower:
    config = read_json(folder / component / "config.json")
    if family == "latent-diffusion":
        return Tower(kind="ldm-bert", config=config, component=component, tokenizer=tokenizer)
    is_xl = family == "stable-diffusion-xl"
    return Tower(
        kind="clip-projection" if is_xl and component == "text_encoder_2" else "clip",
        config=config,
        component=component,
        tokenizer=tokenizer,
        penultimate=is_xl,
    )
