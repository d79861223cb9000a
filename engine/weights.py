"""Weights from disk into modules: strict about keys, and all renaming in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.config import SchedulerConfig, UNetConfig, VAEConfig
from engine.describe import read_json, weights_file
from engine.schedule import NoiseSchedule
from engine.types import EngineError
from engine.unet import UNet
from engine.vae import AutoencoderKL

Module = TypeVar("Module", bound=nn.Module)

_OLD_ATTENTION_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Autoencoders saved by early diffusers name the parts of their attention so; later versions read both."""


def load_unet(folder: Path, dtype: torch.dtype, device: torch.device) -> UNet:
    """The folder's U-Net, in `dtype` on `device`, ready for inference."""
    config = UNetConfig.from_dict(read_json(folder / "unet" / "config.json"))
    with torch.device("meta"):
        unet = UNet(config)
    return _fill(unet, weights_file(folder, "unet"), dtype, device)


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """The folder's autoencoder, in `dtype` on `device`, ready for inference."""
    config = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    return _fill(vae, weights_file(folder, "vae"), dtype, device)


def load_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule that the model was trained with."""
    return NoiseSchedule(SchedulerConfig.from_dict(read_json(folder / "scheduler" / "scheduler_config.json")))


def _fill(module: Module, path: Path, dtype: torch.dtype, device: torch.device) -> Module:
    """Give a module on the meta device the tensors of a safetensors file. Raises EngineError that names a bad key."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} cannot be read: {error}; copy the file again") from error
    tensors = {_rename(key): tensor for key, tensor in tensors.items()}
    _check_keys(module.state_dict(), tensors, path)
    module.load_state_dict({key: tensor.to(device, dtype) for key, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def _rename(key: str) -> str:
    for old, new in _OLD_ATTENTION_NAMES.items():
        key = key.replace(old, new)
    return key


def _check_keys(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise EngineError(
            f"{path} does not match its config.json: {len(missing)} keys missing (first: {missing[:1]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:1]})"
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise EngineError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, its config.json asks for {tuple(expected[key].shape)}"
            )
