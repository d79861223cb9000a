"""Flux.1 dev and schnell: CLIP's pooled state and T5, a transformer, flow matching; dev is distilled for guidance."""

from __future__ import annotations

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
from latentmill.engine.loading.config import BLOCKS_LIMIT, WIDTH_LIMIT, Json
from latentmill.engine.loading.fields import Fields
from latentmill.engine.types import GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.engine.networks.flux import Flux

_PATCH = 2
_MODEL = "model.diffusion_model."
_ENCODERS = "text_encoders.{alias}."
_VAE = "vae."
_GUIDANCE = "guidance_in.in_layer.weight"
_NAMES = {
    r"x_embedder\.": "img_in.",
    r"context_embedder\.": "txt_in.",
    r"time_text_embed\.timestep_embedder\.linear_1\.": "time_in.in_layer.",
    r"time_text_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"time_text_embed\.text_embedder\.linear_1\.": "vector_in.in_layer.",
    r"time_text_embed\.text_embedder\.linear_2\.": "vector_in.out_layer.",
    r"time_text_embed\.guidance_embedder\.linear_1\.": "guidance_in.in_layer.",
    r"time_text_embed\.guidance_embedder\.linear_2\.": "guidance_in.out_layer.",
    r"transformer_blocks\.(\d+)\.norm1\.linear\.": r"double_blocks.\1.img_mod.lin.",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear\.": r"double_blocks.\1.txt_mod.lin.",
    r"transformer_blocks\.(\d+)\.attn\.to_[qkv]\.": r"double_blocks.\1.img_attn.qkv.",
    r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj\.": r"double_blocks.\1.txt_attn.qkv.",
    r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.": r"double_blocks.\1.img_attn.proj.",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out\.": r"double_blocks.\1.txt_attn.proj.",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"double_blocks.\1.img_mlp.0.",
    r"transformer_blocks\.(\d+)\.ff\.net\.2\.": r"double_blocks.\1.img_mlp.2.",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.": r"double_blocks.\1.txt_mlp.0.",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.": r"double_blocks.\1.txt_mlp.2.",
    r"single_transformer_blocks\.(\d+)\.norm\.linear\.": r"single_blocks.\1.modulation.lin.",
    r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)\.": r"single_blocks.\1.linear1.",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    r"single_transformer_blocks\.(\d+)\.proj_out\.": r"single_blocks.\1.linear2.",
    r"norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"proj_out\.": "final_layer.linear.",
}
_ENCODER = ClipEncoder(
    component="text_encoder", tokenizer="tokenizer", alias="clip_l", pooled_only=True, unprojected=True
)
_ENCODER_2 = T5Encoder(component="text_encoder_2", tokenizer="tokenizer_2", alias="t5xxl")


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxConfig:
    """Shape of the transformer, as in `transformer/config.json`, whose channels are those of a whole patch."""

    in_channels: int
    out_channels: int
    heads: int
    axes: tuple[int, ...]
    layers: int
    single_layers: int
    context_dim: int
    pooled_dim: int
    distilled_guidance: bool

    @property
    def sample_size(self) -> int:
        """1024 pixels: the files do not say it."""
        return 128

    @property
    def patch_size(self) -> int:
        """Its pipeline makes tokens of two by two cells."""
        return _PATCH

    @property
    def side_limit(self) -> int | None:
        """Places are angles, which have no end."""
        return None

    @classmethod
    def from_dict(cls, config: Json, where: str = "transformer/config.json") -> FluxConfig:
        """Parse diffusers' `FluxTransformer2DModel` config. Raises EngineError for what is not supported."""
        fields = Fields(config, where)
        if config.get("patch_size", 1) != 1:
            raise fields.refusal("patch_size", "1, as the pipeline makes the patches")
        channels = fields.whole("in_channels", 64, WIDTH_LIMIT)
        if channels % _PATCH**2:
            raise fields.refusal("in_channels", f"a multiple of {_PATCH**2}, the cells of a patch")
        axes = fields.wholes("axes_dims_rope", (16, 56, 56), WIDTH_LIMIT, length=3)
        heads = fields.whole("num_attention_heads", 24, WIDTH_LIMIT)
        head_dim = fields.whole("attention_head_dim", 128, WIDTH_LIMIT // heads)
        if sum(axes) != head_dim or len(axes) != 3 or any(features % 2 for features in axes):
            raise fields.refusal("axes_dims_rope", f"three even numbers whose sum is attention_head_dim, {head_dim}")
        return cls(
            in_channels=channels // _PATCH**2,
            out_channels=fields.whole("out_channels", channels, WIDTH_LIMIT) // _PATCH**2,
            heads=heads,
            axes=axes,
            layers=fields.whole("num_layers", 19, BLOCKS_LIMIT),
            single_layers=fields.whole("num_single_layers", 38, BLOCKS_LIMIT),
            context_dim=fields.whole("joint_attention_dim", 4096, WIDTH_LIMIT),
            pooled_dim=fields.whole("pooled_projection_dim", 768, WIDTH_LIMIT),
            distilled_guidance=fields.flag("guidance_embeds", default=False),
        )


def _build(config: FluxConfig) -> Flux:
    from latentmill.engine.networks.flux import Flux

    return Flux(
        channels=config.in_channels,
        heads=config.heads,
        axes=config.axes,
        layers=config.layers,
        single_layers=config.single_layers,
        context_dim=config.context_dim,
        pooled_dim=config.pooled_dim,
        guidance=config.distilled_guidance,
    )


def _as_trained(config: FluxConfig, encoder: TextEncoderSpec) -> TextEncoderSpec:
    """Schnell, which is not told guidance, was distilled with half as many tokens."""
    if isinstance(encoder, T5Encoder):
        return replace(encoder, length=512 if config.distilled_guidance else 256)
    return encoder


def _origins(config: FluxConfig, ours: Iterable[str]) -> dict[str, Origin]:
    """Where each of our weights lies in its authors' file, behind the prefix."""
    return {key: _origin(key, config.heads * sum(config.axes)) for key in ours}


def _origin(key: str, dim: int) -> Origin:
    """Queries, keys and values are one matrix there; in single blocks the feed-forward's first layer is part of it."""
    name = renamed(key, _NAMES)
    part = re.search(r"\.(?:to_|add_)([qkv])(?:_proj)?\.", key)
    if ".linear1." in name:
        number = "qkv".index(part[1]) if part else 3
        return Origin(name, rows=(number * dim, (number + 1) * dim if part else 7 * dim))
    if part:
        return Origin(name, third="qkv".index(part[1]))
    # Its authors' last layer gives the shift first.
    return Origin(name, swapped=key.startswith("norm_out."))


def _config(shapes: Shapes, prefix: str) -> Json:
    """The config of the transformer in a single file: heads have the published width."""
    dim, channels = shapes[f"{prefix}img_in.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes[f"{prefix}final_layer.linear.weight"][0],
        "num_layers": count(shapes, re.escape(prefix) + r"double_blocks\.(\d{1,3})\."),
        "num_single_layers": count(shapes, re.escape(prefix) + r"single_blocks\.(\d{1,3})\."),
        "num_attention_heads": dim // 128,
        "joint_attention_dim": shapes[f"{prefix}txt_in.weight"][1],
        "pooled_projection_dim": shapes[f"{prefix}vector_in.in_layer.weight"][1],
        "guidance_embeds": f"{prefix}{_GUIDANCE}" in shapes,
    }


def _encoders(shapes: Shapes) -> tuple[TextEncoderSpec, ...]:
    first, second = (_ENCODERS.format(alias=encoder.alias) for encoder in (_ENCODER, _ENCODER_2))
    return (
        replace(_ENCODER, config=renamed_clip_config(shapes, first, open_clip=False)),
        replace(_ENCODER_2, config=t5_config(shapes, f"{second}transformer.")),
    )


def _version(prefix: str, *, distilled: bool, whole: bool) -> SingleFile:
    """One of the forms: the transformer alone, as its authors publish it, or with all other parts, as web UIs do."""
    markers = [f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale"]
    markers += [f"{prefix}{_GUIDANCE}"] if distilled else []
    markers += [f"{_VAE}decoder.conv_in.weight", f"{_ENCODERS.format(alias='t5xxl')}transformer.shared.weight"] * whole
    return SingleFile(
        title=f"Flux.1 {'dev' if distilled else 'schnell'}{'' if whole else ', its transformer alone'}",
        markers=tuple(markers),
        prefix=prefix,
        autoencoder_prefix=_VAE if whole else "",
        denoiser=partial(_config, prefix=prefix),
        autoencoder=(
            partial(compvis.vae_config, scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True, prefix=_VAE)
            if whole
            else None
        ),
        text_encoders=_encoders if whole else None,
        scheduler={
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 3.0 if distilled else 1.0,
            "use_dynamic_shifting": distilled,
        },
    )


def _pooled_text(pooled: Tensor, _request: GenerationRequest) -> Mapping[str, Tensor]:
    return {"pooled": pooled}


FAMILY = Family(
    name="flux",
    pipelines=("FluxPipeline",),
    text_encoders=(_ENCODER, _ENCODER_2),
    denoiser=NetworkSpec(component="transformer", read=FluxConfig.from_dict, build=_build, original_names=_origins),
    autoencoder=compvis.BARE_AUTOENCODER,
    single_files=tuple(
        _version(prefix, distilled=distilled, whole=whole)
        for prefix, whole in ((_MODEL, True), (_MODEL, False), ("", False))
        for distilled in (True, False)
    ),
    encoder_prefix=_ENCODERS,
    ignored=(
        r"text_encoders\.\w+\.logit_scale$",
        # CLIP's projection, which a pooled state that is not projected has no use for
        r"text_encoders\.clip_l\.transformer\.text_projection\.weight$",
        r"text_encoders\.clip_l\.transformer\.text_model\.embeddings\.position_ids$",
        # the same weight by its other name
        r"text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight$",
    ),
    as_trained=_as_trained,
    conditions=_pooled_text,
    scheduler={"timestep_spacing": "trailing"},
    plain_prompts=True,
)
