"""CompVis's U-Net and autoencoder, shared by several families: their configs by shapes, and their keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from latentmill.engine.families.family import NetworkSpec, Origin, Shapes, count, renamed, unnamed
from latentmill.engine.loading.config import Json, UNetConfig, VAEConfig

if TYPE_CHECKING:
    from latentmill.engine.networks.interface import Autoencoder
    from latentmill.engine.networks.unet import UNet

UNET = "model.diffusion_model."
VAE = "first_stage_model."
UNET_MARKER = f"{UNET}input_blocks.0.0.weight"
CODEBOOK = f"{VAE}quantize.embedding.weight"

SCHEDULE: Json = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The noise schedule that most models of this code were trained on."""

IGNORED = (
    r"model_ema\.",  # the running average of the U-Net's weights; used only with use_ema
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|lvlb_weights)$",
    r"(logvar|ddim_.*|v_pred|ztsnr|denoiser\.(log_)?sigmas)$",  # the schedule again, or a flag that says which
    r"first_stage_model\.(loss|model_ema)\.",  # the discriminator and its perceptual loss
)
"""Keys that change no pixel, whichever the family."""

_UNET_INNER = {
    r"norm1\.(?=weight$|bias$)": "in_layers.0.",
    r"conv1\.": "in_layers.2.",
    r"time_emb_proj\.": "emb_layers.1.",
    r"norm2\.(?=weight$|bias$)": "out_layers.0.",
    r"conv2\.": "out_layers.3.",
    r"conv_shortcut\.": "skip_connection.",
}
"""Layers of a residual block; those of a transformer are named alike."""

_EARLY_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Autoencoders saved by early diffusers name the parts of their attention so; later versions read both."""

_VAE_INNER = {
    r"conv_shortcut\.": "nin_shortcut.",
    r"group_norm\.": "norm.",
    r"to_(q|k|v)\.": r"\1.",
    r"to_out\.0\.": "proj_out.",
}


def unet_config(
    shapes: Shapes, *, sample_size: int, heads: int | None = None, head_dim: int = 1, pooled: str | None = None
) -> Json:
    """The U-Net's config, as in `unet/config.json`. `pooled` is the key whose columns are the pooled text's features.

    Walks the way down: a residual block starts a layer, `.0.op` ends a level.
    """
    levels: list[dict[str, int]] = [{"width": 0, "layers": 0, "depth": 0}]
    for number in range(1, count(shapes, re.escape(UNET) + r"input_blocks\.(\d{1,3})\.")):
        block = f"{UNET}input_blocks.{number}."
        if f"{block}0.op.weight" in shapes:
            levels.append({"width": 0, "layers": 0, "depth": 0})
            continue
        levels[-1]["width"] = shapes[f"{block}0.out_layers.3.weight"][0]
        levels[-1]["layers"] += 1
        levels[-1]["depth"] = count(shapes, re.escape(block) + r"1\.transformer_blocks\.(\d{1,3})\.")
    middle = f"{UNET}middle_block.1."
    widths = [level["width"] for level in levels]
    depths = [level["depth"] for level in levels]
    config: dict[str, Any] = {
        "in_channels": shapes[UNET_MARKER][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "sample_size": sample_size,
        "block_out_channels": widths,
        "layers_per_block": levels[0]["layers"],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # A level without attention has no depth; the lowest level's counts for the middle block.
        "transformer_layers_per_block": [
            *(depth or 1 for depth in depths[:-1]),
            count(shapes, re.escape(middle) + r"transformer_blocks\.(\d{1,3})\."),
        ],
        "attention_head_dim": heads or [width // head_dim for width in widths],
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{middle}proj_in.weight"]) == 2,
    }
    label = f"{UNET}label_emb.0.0.weight"
    if pooled is not None:
        features = shapes[label][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (features - shapes[pooled][1]) // 6,
            "projection_class_embeddings_input_dim": features,
        }
    elif label in shapes:
        raise ValueError(f"its U-Net has {label}, a condition besides text")
    return config


def vae_config(
    shapes: Shapes, *, scaling_factor: float, force_upcast: bool = False, shift_factor: float = 0.0, prefix: str = VAE
) -> Json:
    """The autoencoder's config, as in `vae/config.json`."""
    down = f"{prefix}encoder.down."
    has_convolutions = f"{prefix}post_quant_conv.weight" in shapes
    levels = count(shapes, re.escape(down) + r"(\d{1,3})\.block\.")
    attends = [f"{down}{level}.attn.0.norm.weight" in shapes for level in range(levels)]
    config: dict[str, Any] = {
        "block_out_channels": [shapes[f"{down}{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "down_block_types": ["AttnDownEncoderBlock2D" if level else "DownEncoderBlock2D" for level in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if level else "UpDecoderBlock2D" for level in reversed(attends)],
        "layers_per_block": count(shapes, re.escape(down) + r"0\.block\.(\d{1,3})\."),
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "mid_block_add_attention": f"{prefix}decoder.mid.attn_1.norm.weight" in shapes,
        "use_quant_conv": has_convolutions,
        "use_post_quant_conv": has_convolutions,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "force_upcast": force_upcast,
    }
    if CODEBOOK in shapes:
        config |= {"num_vq_embeddings": shapes[CODEBOOK][0], "vq_embed_dim": shapes[CODEBOOK][1]}
    return config


def _unet_origins(config: UNetConfig, ours: Iterable[str]) -> dict[str, Origin]:
    """Where each of our U-Net's weights lies."""
    blocks = _unet_blocks(config)
    return {key: Origin(UNET + _within_block(key, blocks, _UNET_INNER)) for key in ours}


def _vae_origins(config: VAEConfig, ours: Iterable[str], prefix: str = VAE) -> dict[str, Origin]:
    """Where each of our autoencoder's weights lies."""
    blocks = _vae_blocks(config)
    return {key: Origin(prefix + _within_block(key, blocks, _VAE_INNER)) for key in ours}


def _within_block(key: str, blocks: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """Rename the block that a key lies in, then the layer within it."""
    for ours in sorted(blocks, key=len, reverse=True):
        if key.startswith(f"{ours}."):
            rest = key.removeprefix(f"{ours}.")
            return f"{blocks[ours]}.{renamed(rest, inner)}"
    raise unnamed(key)


def _unet_blocks(config: UNetConfig) -> dict[str, str]:
    """The U-Net's blocks as the original numbers them: one list down, one up (arXiv:2105.05233, its code)."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    last = len(config.channels) - 1
    number = 0
    for level, attends in enumerate(config.cross_attention):
        for layer in range(config.layers_per_block):
            number += 1
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if attends:
                names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        if level < last:
            number += 1
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = -1
    for block, attends in enumerate(reversed(config.cross_attention)):
        for layer in range(config.layers_per_block + 1):
            number += 1
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if attends:
                names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
        if block < last:
            names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{2 if attends else 1}.conv"
    return names


def _vae_blocks(config: VAEConfig) -> dict[str, str]:
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv", "quantize": "quantize"}
    last = len(config.channels) - 1
    for side in ("encoder", "decoder"):
        names |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.conv_out": f"{side}.conv_out",
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
        }
    for level in range(len(config.channels)):
        # The original counts the decoder's levels by resolution too; ours in the order they run.
        for ours, theirs, sample, layers in (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}", "down", config.layers_per_block),
            (f"decoder.up_blocks.{last - level}", f"decoder.up.{level}", "up", config.layers_per_block + 1),
        ):
            for layer in range(layers):
                names[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
                names[f"{ours}.attentions.{layer}"] = f"{theirs}.attn.{layer}"
            names[f"{ours}.{sample}samplers.0.conv"] = f"{theirs}.{sample}sample.conv"
    return names


def _build_unet(config: UNetConfig) -> UNet:
    from latentmill.engine.networks.unet import UNet

    return UNet(config)


def _build_autoencoder(config: VAEConfig) -> Autoencoder:
    from latentmill.engine.networks.autoencoder import build_autoencoder

    return build_autoencoder(config)


def _late_name(key: str) -> str:
    for old, new in _EARLY_ATTENTION.items():
        key = key.replace(old, new)
    return key


DENOISER = NetworkSpec(component="unet", read=UNetConfig.from_dict, build=_build_unet, original_names=_unet_origins)
"""The U-Net of latent diffusion."""

AUTOENCODER = NetworkSpec(
    component="vae",
    read=VAEConfig.from_dict,
    build=_build_autoencoder,
    folder_name=_late_name,
    original_names=_vae_origins,
)
"""The autoencoder of latent diffusion, with KL or a codebook."""

BARE_AUTOENCODER = replace(AUTOENCODER, original_names=partial(_vae_origins, prefix=""))
"""The same, where the version of a single file says how the keys begin."""
