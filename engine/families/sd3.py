"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): two CLIP encoders and T5, a transformer, flow matching."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from latentmill.engine.families import compvis
from latentmill.engine.families.clip import ClipEncoder, renamed_clip_config
from latentmill.engine.families.family import (
    Family,
    NetworkSpec,
    Origin,
    Shapes,
    SingleFile,
    TextEncoderSpec,
    count,
    renamed,
)
from latentmill.engine.families.t5 import T5Encoder, t5_config
from latentmill.engine.loading.config import BLOCKS_LIMIT, CELLS_LIMIT, WIDTH_LIMIT, Json
from latentmill.engine.loading.fields import Fields
from latentmill.engine.types import GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.engine.networks.mmdit import MMDiT

_MODEL = "model.diffusion_model."
_VAE = "first_stage_model."
_ENCODERS = "text_encoders.{alias}."
_ENCODER = ClipEncoder(
    component="text_encoder", tokenizer="tokenizer", alias="clip_l", penultimate=True, projection=True
)
_ENCODER_2 = replace(_ENCODER, component="text_encoder_2", tokenizer="tokenizer_2", alias="clip_g")
_ENCODER_3 = T5Encoder(
    component="text_encoder_3", tokenizer="tokenizer_3", alias="t5xxl", length=256, follows=True, optional=True
)
_NAMES = {
    r"pos_embed\.pos_embed": "pos_embed",
    r"pos_embed\.proj\.": "x_embedder.proj.",
    r"time_text_embed\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"time_text_embed\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"time_text_embed\.text_embedder\.linear_1\.": "y_embedder.mlp.0.",
    r"time_text_embed\.text_embedder\.linear_2\.": "y_embedder.mlp.2.",
    r"transformer_blocks\.(\d+)\.norm1\.linear\.": r"joint_blocks.\1.x_block.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear\.": r"joint_blocks.\1.context_block.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.(attn2?)\.to_[qkv]\.": r"joint_blocks.\1.x_block.\2.qkv.",
    r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj\.": r"joint_blocks.\1.context_block.attn.qkv.",
    r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.": r"joint_blocks.\1.x_block.\2.ln_\3.",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.": r"joint_blocks.\1.context_block.attn.ln_\2.",
    r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0\.": r"joint_blocks.\1.x_block.\2.proj.",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out\.": r"joint_blocks.\1.context_block.attn.proj.",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"joint_blocks.\1.x_block.mlp.fc1.",
    r"transformer_blocks\.(\d+)\.ff\.net\.2\.": r"joint_blocks.\1.x_block.mlp.fc2.",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.": r"joint_blocks.\1.context_block.mlp.fc1.",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.": r"joint_blocks.\1.context_block.mlp.fc2.",
    r"norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"proj_out\.": "final_layer.linear.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MMDiTConfig:
    """Shape of the transformer, as in `transformer/config.json`. `grid` counts the places along a side."""

    in_channels: int
    out_channels: int
    sample_size: int
    patch_size: int
    grid: int
    heads: int
    head_dim: int
    layers: int
    context_dim: int
    pooled_dim: int
    norms: bool
    dual_layers: tuple[int, ...]

    @property
    def side_limit(self) -> int | None:
        """Where the embeddings of places end."""
        return self.grid * self.patch_size

    @property
    def distilled_guidance(self) -> bool:
        """It knows guidance by the unconditional pass alone."""
        return False

    @classmethod
    def from_dict(cls, config: Json, where: str = "transformer/config.json") -> MMDiTConfig:
        """Parse diffusers' `SD3Transformer2DModel` config. Raises EngineError for what is not supported."""
        fields = Fields(config, where)
        heads = fields.whole("num_attention_heads", 18, WIDTH_LIMIT)
        head_dim = fields.whole("attention_head_dim", 64, WIDTH_LIMIT // heads)
        if fields.whole("caption_projection_dim", 1152, WIDTH_LIMIT) != heads * head_dim:
            raise fields.refusal("caption_projection_dim", f"{heads * head_dim}, the width of all heads")
        if config.get("qk_norm") not in (None, "rms_norm"):
            raise fields.refusal("qk_norm", "rms_norm or null")
        layers = fields.whole("num_layers", 18, BLOCKS_LIMIT)
        dual = config.get("dual_attention_layers") or ()
        if not isinstance(dual, list | tuple) or any(layer not in range(layers) for layer in dual):
            raise fields.refusal("dual_attention_layers", f"numbers of layers, 0 to {layers - 1}")
        channels = fields.whole("in_channels", 16, WIDTH_LIMIT)
        return cls(
            in_channels=channels,
            out_channels=fields.whole("out_channels", channels, WIDTH_LIMIT),
            sample_size=fields.whole("sample_size", 128, CELLS_LIMIT),
            patch_size=fields.whole("patch_size", 2, CELLS_LIMIT),
            grid=fields.whole("pos_embed_max_size", 96, CELLS_LIMIT),
            heads=heads,
            head_dim=head_dim,
            layers=layers,
            context_dim=fields.whole("joint_attention_dim", 4096, WIDTH_LIMIT),
            pooled_dim=fields.whole("pooled_projection_dim", 2048, WIDTH_LIMIT),
            norms=config.get("qk_norm") == "rms_norm",
            dual_layers=tuple(dual),
        )


def _build(config: MMDiTConfig) -> MMDiT:
    from latentmill.engine.networks.mmdit import MMDiT

    return MMDiT(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch_size=config.patch_size,
        grid=config.grid,
        heads=config.heads,
        head_dim=config.head_dim,
        layers=config.layers,
        context_dim=config.context_dim,
        pooled_dim=config.pooled_dim,
        norms=config.norms,
        dual_layers=config.dual_layers,
    )


def _origins(config: MMDiTConfig, ours: Iterable[str]) -> dict[str, Origin]:
    """Where each of our weights lies in a single file, behind the prefix: queries, keys and values in one matrix."""
    # Where there are two numbers alone, its authors' layers give the shift first.
    swapped = ("norm_out.", f"transformer_blocks.{config.layers - 1}.norm1_context.")
    origins = {}
    for key in ours:
        part = re.search(r"\.(?:to_|add_)([qkv])(?:_proj)?\.", key)
        origins[key] = Origin(
            renamed(key, _NAMES), third="qkv".index(part[1]) if part else None, swapped=key.startswith(swapped)
        )
    return origins


def _config(shapes: Shapes, prefix: str) -> Json:
    """The config of the transformer in a single file: 64 features a head in every published one."""
    dim, channels, patch_size, _ = shapes[f"{prefix}x_embedder.proj.weight"]
    layers = count(shapes, re.escape(prefix) + r"joint_blocks\.(\d{1,3})\.")
    block = f"{prefix}joint_blocks.{{}}.x_block."
    return {
        "in_channels": channels,
        "out_channels": shapes[f"{prefix}final_layer.linear.weight"][0] // patch_size**2,
        "patch_size": patch_size,
        "pos_embed_max_size": math.isqrt(shapes[f"{prefix}pos_embed"][1]),
        "num_layers": layers,
        "num_attention_heads": dim // 64,
        "caption_projection_dim": dim,
        "joint_attention_dim": shapes[f"{prefix}context_embedder.weight"][1],
        "pooled_projection_dim": shapes[f"{prefix}y_embedder.mlp.0.weight"][1],
        "qk_norm": "rms_norm" if f"{block.format(0)}attn.ln_q.weight" in shapes else None,
        "dual_attention_layers": [
            layer for layer in range(layers) if f"{block.format(layer)}attn2.qkv.weight" in shapes
        ],
    }


def _encoders(shapes: Shapes) -> tuple[TextEncoderSpec, ...]:
    first, second, third = (_ENCODERS.format(alias=encoder.alias) for encoder in (_ENCODER, _ENCODER_2, _ENCODER_3))
    encoders: tuple[TextEncoderSpec, ...] = (
        # Its authors' code does not project the first one's pooled state. OpenCLIP pads with 0.
        replace(
            _ENCODER,
            config=renamed_clip_config(shapes, first, open_clip=False),
            projection=False,
            unprojected=True,
        ),
        replace(_ENCODER_2, config=renamed_clip_config(shapes, second, open_clip=True), pad_id=0),
    )
    if f"{third}transformer.shared.weight" not in shapes:
        return encoders
    return (*encoders, replace(_ENCODER_3, config=t5_config(shapes, f"{third}transformer.")))


def _version(prefix: str, *, encoders: bool, autoencoder: bool) -> SingleFile:
    """One of the forms: with all text encoders or without T5, without any, or the transformer alone."""
    token_embedding = f"{_ENCODERS.format(alias='clip_l')}transformer.text_model.embeddings.token_embedding.weight"
    markers = [f"{prefix}joint_blocks.0.x_block.attn.qkv.weight"]
    markers += [token_embedding] * encoders + [f"{_VAE}decoder.conv_in.weight"] * autoencoder
    return SingleFile(
        title=f"Stable Diffusion 3{'' if encoders else ' without text encoders'}",
        markers=tuple(markers),
        prefix=prefix,
        autoencoder_prefix=_VAE if autoencoder else "",
        denoiser=partial(_config, prefix=prefix),
        autoencoder=(
            partial(compvis.vae_config, scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True)
            if autoencoder
            else None
        ),
        text_encoders=_encoders if encoders else None,
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    )


def _pooled_text(pooled: Tensor, _request: GenerationRequest) -> Mapping[str, Tensor]:
    return {"pooled": pooled}


FAMILY = Family(
    name="stable-diffusion-3",
    pipelines=("StableDiffusion3Pipeline",),
    text_encoders=(_ENCODER, _ENCODER_2, _ENCODER_3),
    denoiser=NetworkSpec(component="transformer", read=MMDiTConfig.from_dict, build=_build, original_names=_origins),
    autoencoder=compvis.BARE_AUTOENCODER,
    single_files=(
        _version(_MODEL, encoders=True, autoencoder=True),
        _version(_MODEL, encoders=False, autoencoder=True),
        _version(_MODEL, encoders=False, autoencoder=False),
        _version("", encoders=False, autoencoder=False),
    ),
    encoder_prefix=_ENCODERS,
    ignored=(
        r"text_encoders\.\w+\.logit_scale$",
        r"text_encoders\.clip_[lg]\.transformer\.text_model\.embeddings\.position_ids$",
        # CLIP's projection into the space that it shares with pictures: only the second encoder's is used
        r"text_encoders\.clip_l\.transformer\.text_projection\.weight$",
        # the same weight by its other name
        r"text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight$",
    ),
    conditions=_pooled_text,
    plain_prompts=True,
)
