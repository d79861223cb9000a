"""What a model folder holds, found out without torch: for planning, for the plan's hash, to refuse half a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import SchedulerConfig, UNetConfig, VAEConfig
from engine.types import EngineError

WEIGHTS = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "text_encoder": ("model.safetensors", "model.fp16.safetensors"),
}
"""File names per component, the preferred one first."""

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """A model folder at rest.

    `factor` is the number of pixels that every size must be a multiple of; `default_size` is (width, height) in
    pixels; `max_tokens` counts the start and end marks; `files` maps each file that can change a pixel, by its path in
    the folder, to its sha256.
    """

    name: str
    folder: Path
    family: str
    factor: int
    latent_channels: int
    default_size: tuple[int, int]
    prediction_type: str
    num_train_timesteps: int
    max_tokens: int
    has_safety_checker: bool
    files: dict[str, str]


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


def weights_file(folder: Path, component: str) -> Path:
    """The component's safetensors file. Raises EngineError that names what was looked for."""
    for name in WEIGHTS[component]:
        if (folder / component / name).is_file():
            return folder / component / name
    raise EngineError(
        f"{folder / component} has no weights: looked for {' and '.join(WEIGHTS[component])}; "
        "other formats must be converted to safetensors first"
    )


def describe_model(folder: str | Path) -> ModelDescription:
    """Read and hash a diffusers folder. Raises EngineError that names a missing file or an unsupported switch."""
    folder = Path(folder)
    if not folder.is_dir():
        raise EngineError(f"model folder {folder} does not exist; give a local diffusers folder")
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise EngineError(
            f"{folder}/model_index.json names the pipeline {pipeline!r}; this version loads StableDiffusionPipeline"
        )
    unet = UNetConfig.from_dict(read_json(folder / "unet" / "config.json"))
    vae = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
    scheduler = SchedulerConfig.from_dict(read_json(folder / "scheduler" / "scheduler_config.json"))
    text = read_json(folder / "text_encoder" / "config.json")
    _check_fit(folder, unet, vae, text)
    side = unet.sample_size * vae.factor
    return ModelDescription(
        name=folder.resolve().name,
        folder=folder,
        family="stable-diffusion",
        factor=vae.factor,
        latent_channels=vae.latent_channels,
        default_size=(side, side),
        prediction_type=scheduler.prediction_type,
        num_train_timesteps=scheduler.num_train_timesteps,
        max_tokens=int(text.get("max_position_embeddings", 77)),
        has_safety_checker=(folder / "safety_checker").is_dir(),
        files={path: _sha256(folder / path) for path in _pixel_files(folder)},
    )


class Tokenizer:
    """The folder's tokenizer as a counter of tokens; it is the tokenizer that the text encoder uses."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, start and end marks not included."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a described model folder."""
    return Tokenizer(Path(folder))


def _check_fit(folder: Path, unet: UNetConfig, vae: VAEConfig, text: dict[str, Any]) -> None:
    """Refuse parts that do not fit together before gigabytes are read."""
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise EngineError(
            f"{folder}: the U-Net takes {unet.in_channels} latent channels and gives {unet.out_channels}, "
            f"the autoencoder has {vae.latent_channels}: these parts are not of one text-to-image model"
        )
    if text.get("hidden_size") != unet.context_dim:
        raise EngineError(
            f"{folder}: the text encoder is {text.get('hidden_size')} wide, the U-Net's cross-attention expects "
            f"{unet.context_dim}: these parts are not of one model"
        )


def _pixel_files(folder: Path) -> list[str]:
    """Paths, relative and sorted, of all files that can change a pixel or a verdict."""
    tokenizer = [folder / "tokenizer" / name for name in _TOKENIZER_FILES if (folder / "tokenizer" / name).is_file()]
    if not tokenizer:
        raise EngineError(f"{folder / 'tokenizer'} is missing or empty: looked for {', '.join(_TOKENIZER_FILES)}")
    paths = [folder / "model_index.json", folder / "scheduler" / "scheduler_config.json", *tokenizer]
    for component in WEIGHTS:
        paths += [folder / component / "config.json", weights_file(folder, component)]
    paths += [path for path in (folder / "safety_checker").glob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
