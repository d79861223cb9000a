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

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import AutoencoderKL
from training import architecture, diffusion, latents, tokenizer
from training.common import load_checkpoint

DIFFUSERS_VERSION = "0.30.0"  # the oldest release whose classes the configs were checked against by name
TEXT_PREFIX = "text_model."
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
    """Write what `work` holds to `folder` and check its size; the model card is the evaluation's to write."""
    if not (folder / "tokenizer").is_dir() or work.joinpath("tokenizer").is_dir():
        shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    model = diffusion.Model(len(tokenizer.load(folder / "tokenizer")))
    checkpoint = load_checkpoint(work / diffusion.CHECKPOINT)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["average"]["values"])
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", {**architecture.SCHEDULER, **_version()})
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
    unet = {
        key: value[:, :, None, None] if key.endswith(PROJECTIONS) else value
        for key, value in model.unet.state_dict().items()
    }
    _write_part(folder / "unet", {**architecture.UNET, **_version()}, unet, WEIGHTS)
    _write_part(folder / "vae", {**architecture.VAE, **_version()}, _first_stage(work), WEIGHTS)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise RuntimeError(f"{folder} holds {size / 2**20:.1f} MB; the limit is {SIZE_LIMIT / 2**20:.0f} MB")
    print(f"exported {size / 2**20:.1f} MB to {folder}", flush=True)
    return folder


def _version() -> dict[str, str]:
    return {"_diffusers_version": DIFFUSERS_VERSION}


def _first_stage(work: Path) -> dict[str, Tensor]:
    """The folded autoencoder; before the latents stage, whatever there is, so that the layout can be tried."""
    if (work / latents.AUTOENCODER).is_file():
        return latents.folded_autoencoder(work)
    checkpoint = load_checkpoint(work / "autoencoder.pt")
    if checkpoint is not None:
        values: dict[str, Tensor] = checkpoint["average"]["values"]
        return values
    return AutoencoderKL(VAEConfig.from_dict(architecture.VAE)).state_dict()


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
    """The second stage's shipped weights, or None if there are none of this shape.

    Lays the tokenizer and the first stage that belong to them in `work`, where the other stages find them.
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
    if not (work / latents.AUTOENCODER).is_file():
        shutil.copytree(folder / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
        save_file({key: value.float() for key, value in load_file(paths["vae"]).items()}, work / latents.AUTOENCODER)
    model = diffusion.Model(len(tokenizer.load(folder / "tokenizer")))
    prefixed = any(key.startswith(f"text_encoder.{TEXT_PREFIX}") for key in model.state_dict())
    state = {
        f"unet.{key}": value.flatten(1) if key.endswith(PROJECTIONS) else value
        for key, value in load_file(paths["unet"]).items()
    }
    for key, value in load_file(paths["text_encoder"]).items():
        state["text_encoder." + (key if prefixed else key.removeprefix(TEXT_PREFIX))] = value
    return state
