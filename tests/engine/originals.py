"""The same random weights in one file with the original key names.

The names come from the engine's own table read backwards; what makes that a test is the judge: diffusers, which reads
these files with a table of its own, and the digests of the original modules' names in test_single_files.py.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentmill.engine.families.family import Origin
from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.keys import original_names
from latentmill.engine.loading.layout import find_model
from latentmill.engine.loading.weights import load_autoencoder, load_denoiser, load_text_encoder
from latentmill.engine.types import ModelSpec

CPU = torch.device("cpu")


def original_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder by their original names, with what such files carry besides."""
    layout = find_model(ModelSpec(model=str(folder)))
    blueprint = layout.blueprint
    modules = {
        blueprint.family.denoiser.component: load_denoiser(layout, torch.float32, CPU),
        blueprint.family.autoencoder.component: load_autoencoder(layout, torch.float32, CPU),
        **{encoder.component: load_text_encoder(layout, encoder, torch.float32, CPU) for encoder in blueprint.encoders},
    }
    weights: dict[str, Tensor] = {}
    for component, module in modules.items():
        ours = {key.removeprefix("text_model."): tensor for key, tensor in module.state_dict().items()}
        weights |= as_original(original_names(blueprint, component, ours), ours)
    for key in list(weights):
        if weights[key].ndim == 2 and is_convolution(blueprint, key):
            weights[key] = weights[key][:, :, None, None]
    return weights | _beside(blueprint.family.name, weights)


def joint_weights(folder: Path, prefix: str, autoencoder_prefix: str, *components: str) -> dict[str, Tensor]:
    """Some components of a transformer's folder by the names of single files, which have no other tensors beside."""
    layout = find_model(ModelSpec(model=str(folder)))
    blueprint = dataclasses.replace(layout.blueprint, denoiser_prefix=prefix, autoencoder_prefix=autoencoder_prefix)
    loaders = {
        blueprint.family.denoiser.component: lambda: load_denoiser(layout, torch.float32, CPU),
        blueprint.family.autoencoder.component: lambda: load_autoencoder(layout, torch.float32, CPU),
    } | {
        encoder.component: lambda encoder=encoder: load_text_encoder(layout, encoder, torch.float32, CPU)
        for encoder in blueprint.encoders
    }
    weights: dict[str, Tensor] = {}
    for component, load in loaders.items():
        if component in (components or loaders):
            ours = {key.removeprefix("text_model."): tensor for key, tensor in load().state_dict().items()}
            weights |= as_original(original_names(blueprint, component, ours), ours)
    return weights


def as_original(origins: Mapping[str, Origin], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one component by their original names, put together where the original has one for several."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, origin in origins.items():
        tensor = ours[key].T if origin.transposed else ours[key]
        if origin.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        place = origin.rows[0] if origin.rows is not None else origin.third or 0
        parts[origin.key][place] = tensor
    return {key: torch.cat([part for _, part in sorted(found.items())]).clone() for key, found in parts.items()}


def is_convolution(blueprint: Blueprint, key: str) -> bool:
    """Whether a linear layer of ours is a 1x1 convolution in the original: those around attention often are."""
    if key.startswith("first_stage_model."):
        return ".attn" in key
    return key.endswith((".proj_in.weight", ".proj_out.weight")) and not blueprint.unet.linear_projection


def _beside(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers, averages and unused layers as published files have them: none may change a picture."""
    beside = {name: torch.rand(1000) for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "logvar")}
    beside["model_ema.decay"] = torch.tensor(0.9)
    beside["model_ema.diffusion_modeltime_embed0weight"] = torch.randn(4, 4)
    beside["first_stage_model.loss.logvar"] = torch.zeros(1)
    if "cond_stage_model.model.ln_final.weight" in weights:
        last = "cond_stage_model.model.transformer.resblocks.1."
        unused = {key.replace(".1.", ".2."): torch.randn_like(weights[key]) for key in weights if key.startswith(last)}
        width = len(weights["cond_stage_model.model.ln_final.weight"])
        beside |= unused | {"cond_stage_model.model.text_projection": torch.randn(width, width)}
        beside["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    elif "cond_stage_model.transformer.token_emb.weight" in weights:
        vocabulary, width = weights["cond_stage_model.transformer.token_emb.weight"].shape
        beside["cond_stage_model.transformer.to_logits.weight"] = torch.randn(vocabulary, width)
        beside["cond_stage_model.transformer.to_logits.bias"] = torch.randn(vocabulary)
    elif family == "stable-diffusion":
        beside["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        beside["cond_stage_model.transformer.text_projection.weight"] = torch.randn(64, 64)
        beside["cond_stage_model.logit_scale"] = torch.tensor(4.6)
    else:
        beside["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        beside["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
        beside["denoiser.sigmas"] = torch.rand(1000)
    return beside


def write_safetensors(folder: Path, path: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    weights = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in original_weights(folder).items()
    }
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path, metadata or None)
    return path


class Callback:
    """What a training loop leaves in its checkpoints: an object whose class the reader does not have."""

    def __init__(self) -> None:
        self.best = torch.zeros(3)
        self.paths = {"last": Path("/somewhere")}


def write_ckpt(
    folder: Path, path: Path, dtype: torch.dtype = torch.float32, changes: Mapping[str, Tensor | None] | None = None
) -> Path:
    """`changes` replaces tensors by name, adds some, or leaves out those that are None."""
    weights = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in (original_weights(folder) | dict(changes or {})).items()
        if tensor is not None
    }
    content = {"state_dict": weights, "global_step": 470000, "epoch": 3, "callbacks": {Callback: Callback()}}
    torch.save(content, path)
    return path
