"""The diffusers folder layout: its architecture, and which files count. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from latentmill.engine.families.table import PIPELINES
from latentmill.engine.guards.safety import checker_files
from latentmill.engine.loading.blueprint import Blueprint, check_fit
from latentmill.engine.loading.checkpoint import is_index, shard_paths
from latentmill.engine.loading.files import read_json
from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.loading.vocabulary import tokenizer_files
from latentmill.engine.types import EngineError

_DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
)
_TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
)


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

    scheduler, where = config("scheduler", "scheduler_config.json")
    left_out = [
        encoder for encoder in family.text_encoders if encoder.optional and index.get(encoder.component) == [None, None]
    ]
    denoiser = family.denoiser.read(*config(family.denoiser.component))
    encoders = [encoder for encoder in family.text_encoders if encoder not in left_out]
    if family.as_trained is not None:
        encoders = [family.as_trained(denoiser, encoder) for encoder in encoders]
    blueprint = Blueprint(
        family=family,
        denoiser=denoiser,
        autoencoder=family.autoencoder.read(*config(family.autoencoder.component)),
        scheduler=SchedulerConfig.from_dict({**family.scheduler, **scheduler}, where),
        encoders=tuple(encoder.configured(*config(encoder.component)) for encoder in encoders),
        empty_tokens=sum(encoder.max_tokens for encoder in left_out),
        force_zeros_for_empty_prompt=(
            family.zeros_for_empty_prompt and bool(index.get("force_zeros_for_empty_prompt", True))
        ),
    )
    check_fit(blueprint, folder)
    return blueprint


def pipeline_parts(index: Path) -> tuple[str, ...]:
    """The parts of a pipeline that the engine does not run itself, by its model_index.json; else empty.

    Raises EngineError for a part that is no folder beside that file: its files would be read, and their digests kept.
    """
    content = read_json(index)
    if not isinstance(content.get("_class_name"), str) or content["_class_name"] in PIPELINES:
        return ()
    parts = tuple(
        part for part, entry in content.items() if isinstance(entry, list) and len(entry) == 2 and None not in entry
    )
    for part in parts:
        if not part.isidentifier():  # as every part is: the library passes them by keyword
            raise EngineError(f"{index} names a part {part!r}: a part's name is that of a folder beside it")
    return parts


def weights_files(folder: Path, blueprint: Blueprint, components: Collection[str] | None = None) -> dict[str, Path]:
    """The weights of each component, or of some: safetensors, or the index of its shards, where there are any.

    Raises EngineError that names what was looked for.
    """
    encoders = [encoder.component for encoder in blueprint.encoders]
    found = {}
    for component in blueprint.components if components is None else components:
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
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files |= part_files(folder, weights_files(folder, blueprint))
    return dict(sorted((files | checker_files(folder)).items()))


def part_files(folder: Path, weights: Mapping[str, Path]) -> dict[str, Path]:
    """The config and the weights of some components, by relative path."""
    paths = []
    for component, file in weights.items():
        paths += [folder / component / "config.json", file]
        paths += shard_paths(file) if is_index(file) else []
    return {path.relative_to(folder).as_posix(): path for path in paths}
