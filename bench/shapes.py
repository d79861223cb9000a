"""Models of published shapes with random weights, as folders that ours and diffusers load alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.machine import ROOT

EMBEDDED = ROOT / "engine" / "embedded"

_KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection")  # of a family's first and second text encoder
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One family at its published width."""

    side: int
    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    encoders: Mapping[str, Mapping[str, Any]]
    extra: Mapping[str, Any]


def _attention(levels: tuple[str, ...]) -> dict[str, Any]:
    up = [name.replace("Down", "Up") for name in reversed(levels)]
    return {"down_block_types": list(levels), "up_block_types": up}


def _vae(sample_size: int, scaling_factor: float, *, force_upcast: bool) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": force_upcast,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def _clip(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": width,
    }


SHAPES: Mapping[str, Shape] = {
    "sd15": Shape(
        side=512,
        pipeline="StableDiffusionPipeline",
        unet={
            **_UNET,
            **_attention((_CROSS, _CROSS, _CROSS, _PLAIN)),
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "sample_size": 64,
        },
        vae=_vae(512, 0.18215, force_upcast=False),
        encoders={"text_encoder": _clip(768, 12, 12, "quick_gelu")},
        extra={
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        },
    ),
    "sdxl": Shape(
        side=1024,
        pipeline="StableDiffusionXLPipeline",
        unet={
            **_UNET,
            **_attention((_PLAIN, _CROSS, _CROSS)),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
        vae=_vae(1024, 0.13025, force_upcast=True),
        encoders={
            "text_encoder": _clip(768, 12, 12, "quick_gelu"),
            "text_encoder_2": _clip(1280, 32, 20, "gelu"),
        },
        extra={"feature_extractor": [None, None], "image_encoder": [None, None], "force_zeros_for_empty_prompt": True},
    ),
}


def folder_of(name: str, work: Path, dtype: torch.dtype, *, narrow: bool = False) -> Path:
    """The embedded model's folder, or a new one of a published shape; `narrow` has a tenth of the width, for tests."""
    return EMBEDDED if name == "embedded" else _write(_narrowed(SHAPES[name]) if narrow else SHAPES[name], work, dtype)


def _write(shape: Shape, folder: Path, dtype: torch.dtype) -> Path:
    """The tokenizer is the embedded model's: speed does not depend on words."""
    torch.manual_seed(0)
    index: dict[str, Any] = {
        "_class_name": shape.pipeline,
        "_diffusers_version": "0.30.0",
        **shape.extra,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for kind, encoder in zip(_KINDS, shape.encoders, strict=False):
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        index |= {encoder: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
        shutil.copytree(EMBEDDED / "tokenizer", folder / tokenizer)
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a GPU draws billions of numbers in no time
        for kind, (encoder, config) in zip(_KINDS, shape.encoders.items(), strict=False):
            _write_encoder(folder / encoder, kind, config, dtype)
        _write_unet(folder / "unet", shape.unet, dtype)
        _write_vae(folder / "vae", shape.vae, dtype)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def _write_encoder(folder: Path, kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    import transformers

    ours = json.loads((EMBEDDED / "text_encoder" / "config.json").read_text())
    shared = {name: ours[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    encoder = getattr(transformers, kind)(transformers.CLIPTextConfig(**shared, **config))
    encoder.to(dtype).save_pretrained(folder)


def _write_unet(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    from latentmill.engine.loading.config import UNetConfig
    from latentmill.engine.networks.unet import UNet

    linear = config.get("use_linear_projection", False)
    state = {
        # A folder without linear projections holds them as 1x1 convolutions.
        key: value[:, :, None, None] if key.endswith(("proj_in.weight", "proj_out.weight")) and not linear else value
        for key, value in UNet(UNetConfig.from_dict(dict(config))).state_dict().items()
    }
    _write_part(folder, config, state, dtype)


def _write_vae(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    from latentmill.engine.loading.config import VAEConfig
    from latentmill.engine.networks.autoencoder import AutoencoderKL

    _write_part(folder, config, AutoencoderKL(VAEConfig.from_dict(dict(config))).state_dict(), dtype)


def _write_part(folder: Path, config: Mapping[str, Any], state: Mapping[str, Any], dtype: torch.dtype) -> None:
    _write_json(folder / "config.json", config)
    tensors = {key: value.to(dtype).contiguous() for key, value in state.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def _narrowed(shape: Shape) -> Shape:
    """The same structure at a tenth of the width and one transformer layer, for tests."""

    def channels(config: Mapping[str, Any]) -> dict[str, Any]:
        return {"block_out_channels": [32 * (1 + number // 2) for number, _ in enumerate(config["block_out_channels"])]}

    encoders = {name: {**config, **_clip(64, 2, 1, config["hidden_act"])} for name, config in shape.encoders.items()}
    width = 64 * len(encoders)
    unet = {**shape.unet, **channels(shape.unet), "cross_attention_dim": width, "layers_per_block": 1}
    if "projection_class_embeddings_input_dim" in unet:
        unet |= {"projection_class_embeddings_input_dim": 64 + 6 * 256, "transformer_layers_per_block": [1, 1, 1]}
        unet |= {"attention_head_dim": [1, 1, 2]}
    return replace(shape, side=64, unet=unet, vae={**shape.vae, **channels(shape.vae)}, encoders=encoders)
