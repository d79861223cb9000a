"""The diffusers folder layout: its architecture, and which files count. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentmill.engine.families.table import PIPELINES
from latentmill.engine.guards.safety import checker_files
from latentmill.engine.loading.blueprint import Blueprint, check_fit
from latentmill.engine.loading.config import SchedulerConfig
from latentmill.engine.loading.files import read_json
from latentmill.engine.loading.vocabulary import tokenizer_files
from latentmill.engine.types import EngineError

_DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")


def read_blueprint(folder: Path) -> Blueprint:
    """The architecture that a folder's JSON files describe. Raises EngineError that names what is not supported."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    family = PIPELINES.get(name) if isinstance(name, str) else None
    if family is None:
        raise EngineError(
            f"{folder}/model_index.json names the pipeline {name!r}; this version loads {', '.join(PIPELINES)}"
        )

    def config(component: str, file: str = "config.json") -> tuple[dict[str, Any], str]:
        path = folder / component / file
        return read_json(path), str(path)

    blueprint = Blueprint(
        family=family,
        denoiser=family.denoiser.read(*config(family.denoiser.component)),
        autoencoder=family.autoencoder.read(*config(family.autoencoder.component)),
        scheduler=SchedulerConfig.from_dict(*config("scheduler", "scheduler_config.json")),
        encoders=tuple(encoder.configured(*config(encoder.component)) for encoder in family.text_encoders),
        force_zeros_for_empty_prompt=(
            family.zeros_for_empty_prompt and bool(index.get("force_zeros_for_empty_prompt", True))
        ),
    )
    check_fit(blueprint, folder)
    return blueprint


def pipeline_parts(index: Path) -> tuple[str, ...]:
    """The parts of a pipeline that the engine does not run itself, by its model_index.json; else empty."""
    content = read_json(index)
    if not isinstance(content.get("_class_name"), str) or content["_class_name"] in PIPELINES:
        return ()
    return tuple(
        part for part, entry in content.items() if isinstance(entry, list) and len(entry) == 2 and None not in entry
    )


def weights_files(folder: Path, blueprint: Blueprint) -> dict[str, Path]:
    """Each component's weights: safetensors where there are any. Raises EngineError that names what was looked for."""
    encoders = [encoder.component for encoder in blueprint.encoders]
    found = {}
    for component in blueprint.components:
        names = _TRANSFORMERS_WEIGHTS if component in encoders else _DIFFUSERS_WEIGHTS
        paths = (folder / component / name for name in names)
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise EngineError(f"{folder / component} has no weights: looked for {', '.join(names)}")
        found[component] = path
    return found


def pixel_files(folder: Path, blueprint: Blueprint) -> dict[str, Path]:
    """The files that can change a pixel or a verdict, by sorted relative path. Raises EngineError if one is missing."""
    paths = [folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"]
    for encoder in blueprint.encoders:
        paths += tokenizer_files(folder / encoder.tokenizer)
    for component, weights in weights_files(folder, blueprint).items():
        paths += [folder / component / "config.json", weights]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return dict(sorted((files | checker_files(folder)).items()))
