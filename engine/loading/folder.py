"""The diffusers folder layout: which file holds what, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentmill.engine.loading.blueprint import Blueprint, Family, Tower, check_fit
from latentmill.engine.loading.config import SchedulerConfig, UNetConfig, VAEConfig
from latentmill.engine.loading.encoder_config import clip_text_config, ldm_bert_config
from latentmill.engine.loading.files import read_json
from latentmill.engine.loading.vocabulary import tokenizer_files
from latentmill.engine.types import EngineError

_DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
PROCESSOR_FILE = "feature_extractor/preprocessor_config.json"
"""How a safety checker's pictures are prepared."""


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


def read_blueprint(folder: Path) -> Blueprint:
    """The architecture that a folder's JSON files describe. Raises EngineError that names what is not supported."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    pipeline = _PIPELINES.get(name) if isinstance(name, str) else None
    if pipeline is None:
        raise EngineError(
            f"{folder}/model_index.json names the pipeline {name!r}; this version loads {', '.join(_PIPELINES)}"
        )
    unet, vae = folder / "unet" / "config.json", folder / pipeline.vae_component / "config.json"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    blueprint = Blueprint(
        family=pipeline.family,
        unet=UNetConfig.from_dict(read_json(unet), str(unet)),
        vae=VAEConfig.from_dict(read_json(vae), str(vae)),
        scheduler=SchedulerConfig.from_dict(read_json(scheduler), str(scheduler)),
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
    """The files of a folder's own safety checker that are read: they can change a verdict. By relative path."""
    if not (folder / "safety_checker").is_dir():
        return {}
    names = ("safety_checker/config.json", "safety_checker/model.safetensors", PROCESSOR_FILE)
    return {name: folder / name for name in names if (folder / name).is_file()}


def _tower(folder: Path, family: Family, component: str, tokenizer: str) -> Tower:
    path = folder / component / "config.json"
    if family == "latent-diffusion":
        config = ldm_bert_config(read_json(path), str(path))
        return Tower(kind="ldm-bert", config=config, component=component, tokenizer=tokenizer)
    is_xl = family == "stable-diffusion-xl"
    return Tower(
        kind="clip-projection" if is_xl and component == "text_encoder_2" else "clip",
        config=clip_text_config(read_json(path), str(path)),
        component=component,
        tokenizer=tokenizer,
        penultimate=is_xl,
    )
