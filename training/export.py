"""The trained parts as a diffusers folder in fp16: `engine/embedded/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import architecture, autoencoder, diffusion, latents, tokenizer
from training.card import TRAINING
from training.common import load_checkpoint

DIFFUSERS_VERSION = "0.30.0"  # the oldest release whose classes the configs were checked against by name
TEXT_PREFIX = "text_model."
TABLE = "token_embedding.weight"
PROJECTIONS = ("proj_in.weight", "proj_out.weight")  # linear in the engine, 1x1 convolutions in this kind of folder
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZE_LIMIT = 32 * 2**20
EMBEDDED = Path(__file__).resolve().parent.parent / "engine" / "embedded"

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(work: Path, folder: Path = EMBEDDED) -> Path:
    """Write what `work` holds to `folder` and check its size; the model card is the evaluation's to write.

    Without a second stage in `work`, the one in `folder` stays: a decoder that learned on fits it as it is.
    """
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", {**architecture.SCHEDULER, **_version()})
    checkpoint = load_checkpoint(work / diffusion.CHECKPOINT)
    if checkpoint is not None:
        shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        _write_second_stage(folder, checkpoint["average"]["values"])
    _write_part(folder / "vae", {**architecture.VAE, **_version()}, latents.first_stage(work), WEIGHTS)
    _write_json(folder / TRAINING, history(work))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise RuntimeError(f"{folder} holds {size / 2**20:.1f} MB; the limit is {SIZE_LIMIT / 2**20:.0f} MB")
    print(f"exported {size / 2**20:.1f} MB to {folder}", flush=True)
    return folder


def _write_second_stage(folder: Path, values: Mapping[str, Tensor]) -> None:
    model = diffusion.Model(len(tokenizer.load(folder / "tokenizer")))
    model.load_state_dict(values)
    text = {key: value for key, value in model.text_encoder.state_dict().items() if not key.endswith("position_ids")}
    _write_part(
        folder / "text_encoder",
        {
            "architectures": ["CLIPTextModel"],
            **model.text_encoder.config.to_diff_dict(),
            "model_type": "clip_text_model",
        },
        {key if key.startswith(TEXT_PREFIX) else TEXT_PREFIX + key: value for key, value in text.items()},
        "model.safetensors",
    )
    write_unet(folder, model.unet.state_dict())


def write_unet(folder: Path, values: Mapping[str, Tensor]) -> None:
    """The U-Net of a model's folder, by the weights that the engine names."""
    unet = {key: value[:, :, None, None] if key.endswith(PROJECTIONS) else value for key, value in values.items()}
    _write_part(folder / "unet", {**architecture.UNET, **_version()}, unet, WEIGHTS)


def history(work: Path) -> dict[str, Any]:
    """What each stage in `work` began with and how long it took; the model card reads it."""
    stages = {}
    warm = (work / autoencoder.START).is_file()
    for name, path in (("first stage", autoencoder.CHECKPOINT), ("second stage", diffusion.CHECKPOINT)):
        checkpoint = load_checkpoint(work / path)
        if checkpoint is not None:
            stages[name] = {
                "began_with": "the weights shipped before" if warm else "nothing",
                "minutes_of_each_core": round(checkpoint["elapsed"] / 60, 1),
                "minutes_by_the_clock": round(checkpoint["wall"] / 60, 1),
                "processes": checkpoint["processes"],
                "steps": checkpoint["step"],
            }
    return stages


def _version() -> dict[str, str]:
    return {"_diffusers_version": DIFFUSERS_VERSION}


def _write_part(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], name: str) -> None:
    _write_json(folder / "config.json", config)
    halves = {key: value.detach().to(torch.float16).contiguous().cpu() for key, value in state.items()}
    for key, value in halves.items():
        if not torch.isfinite(value).all():
            raise RuntimeError(f"{folder.name}: {key} is not finite in fp16")
    save_file(halves, folder / name, metadata={"format": "pt"})
    (folder / name).chmod(0o644)  # safetensors writes for the owner only; the package is for all


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def warm_start(work: Path, folder: Path = EMBEDDED) -> dict[str, Tensor] | None:
    """The second stage's shipped weights under the tokenizer of `work`, or None if there are none of this shape.

    Lays the first stage that belongs to them and the tokenizer in `work`, where the other stages find them.
    """
    paths = {
        "vae": folder / "vae" / WEIGHTS,
        "unet": folder / "unet" / WEIGHTS,
        "text_encoder": folder / "text_encoder" / "model.safetensors",
    }
    if not all(path.is_file() for path in paths.values()):
        return None
    for part, expected in (("vae", architecture.VAE), ("unet", architecture.UNET)):
        config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        if any(config.get(key) != value for key, value in expected.items()):
            return None
    if not (work / autoencoder.START).is_file():
        save_file({key: value.float() for key, value in load_file(paths["vae"]).items()}, work / autoencoder.START)
    if not (work / "tokenizer").is_dir():
        tokenizer.build(work / "tokenizer")
    words, known = tokenizer.load(work / "tokenizer"), tokenizer.load(folder / "tokenizer")
    torch.manual_seed(0)
    model = diffusion.Model(len(words))
    prefixed = any(key.startswith(f"text_encoder.{TEXT_PREFIX}") for key in model.state_dict())
    state = {
        f"unet.{key}": value.flatten(1) if key.endswith(PROJECTIONS) else value
        for key, value in load_file(paths["unet"]).items()
    }
    for key, value in load_file(paths["text_encoder"]).items():
        state["text_encoder." + (key if prefixed else key.removeprefix(TEXT_PREFIX))] = value
    state = {key: value.float() for key, value in state.items()}
    for key in [key for key in state if key.endswith(TABLE)]:
        state[key] = _spell(model.state_dict()[key], words.get_vocab(), state[key], known.get_vocab())
    return state


def _spell(fresh: Tensor, words: Mapping[str, int], learned: Tensor, known: Mapping[str, int]) -> Tensor:
    """`fresh` with the rows of the words that were known before, wherever each vocabulary has them."""
    table = fresh.clone()
    for word, row in words.items():
        if word in known:
            table[row] = learned[known[word]]
    return table
