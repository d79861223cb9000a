"""All renaming of weights: from the names of published checkpoints to those of our networks. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from latentmill.engine.loading.blueprint import Blueprint, Tower
from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.types import EngineError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a weight comes from: a key of the file, one third of it where `third` is given, or its transpose."""

    key: str
    third: int | None = None
    transposed: bool = False


_EARLY_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Autoencoders saved by early diffusers name the parts of their attention so; later versions read both."""

_CLIP_POSITIONS = "embeddings.position_ids"
"""A constant, 0 to 76, that older CLIP checkpoints carry along."""


def folder_name(component: str, key: str) -> str | None:
    """Our name of a key in a folder's file; None for a key that is ignored knowingly."""
    if component in ("vae", "vqvae"):
        for old, new in _EARLY_ATTENTION.items():
            key = key.replace(old, new)
        return key
    if component == "bert":
        # The head that was trained along with the encoder plays no part in pictures.
        return None if key.startswith("to_logits.") else _renamed(key.removeprefix("model."), _LDM_BERT_FOLDER)
    if component.startswith("text_encoder"):
        key = key.removeprefix("text_model.")
        return None if key == _CLIP_POSITIONS else key
    return key


_LDM_BERT_FOLDER = {
    r"embed_tokens\.": "token_embedding.",
    r"embed_positions\.": "position_embedding.",
    r"layer_norm\.": "norm.",
    r"(layers\.\d+\.)self_attn_layer_norm\.": r"\1attention_norm.",
    r"(layers\.\d+\.)self_attn\.(q|k|v)_proj\.": r"\1attention.to_\2.",
    r"(layers\.\d+\.)self_attn\.out_proj\.": r"\1attention.to_out.",
    r"(layers\.\d+\.)final_layer_norm\.": r"\1feed_forward_norm.",
    r"(layers\.\d+\.)fc1\.": r"\1expand.",
    r"(layers\.\d+\.)fc2\.": r"\1contract.",
}


def _renamed(key: str, table: Mapping[str, str]) -> str:
    for pattern, replacement in table.items():
        renamed, changes = re.subn(f"^{pattern}", replacement, key)
        if changes:
            return renamed
    return key


_UNET = "model.diffusion_model."
_FIRST_STAGE = "first_stage_model."

_IGNORED = (
    re.compile(r"model_ema\."),  # the running average of the U-Net's weights; who samples with it asks by name
    re.compile(r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|lvlb_weights)$"),
    re.compile(
        r"(logvar|ddim_.*|v_pred|ztsnr|denoiser\.(log_)?sigmas)$"
    ),  # the schedule again, or a mark that says which
    re.compile(r"first_stage_model\.(loss|model_ema)\."),  # the discriminator and its perceptual loss
    re.compile(
        r"(cond_stage_model|conditioner\.embedders\.\d)\.(transformer\.)?(text_model\.)?embeddings\.position_ids$"
    ),
    re.compile(r"(cond_stage_model|conditioner\.embedders\.\d)\.logit_scale$"),
    re.compile(r"(cond_stage_model|conditioner\.embedders\.\d)\.model\.(logit_scale|attn_mask)$"),
    # CLIP's projection into the space that it shares with pictures: web UIs save it along, no model here uses it
    re.compile(r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?$"),
    re.compile(r"cond_stage_model\.transformer\.to_logits\."),
)
"""Keys of single files that change no pixel, whichever the family."""


def is_ignored(blueprint: Blueprint, key: str) -> bool:
    """Whether a key of a single file plays no part in pictures. All others must be claimed."""
    if any(pattern.match(key) for pattern in _IGNORED):
        return True
    # Stable Diffusion 2 takes the states before the last layer, so its builders left that layer unused; nor does it
    # pool, so the projection is idle.
    tower = blueprint.towers[0]
    if blueprint.family != "stable-diffusion" or not is_open_clip(tower):
        return False
    last = f"cond_stage_model.model.transformer.resblocks.{tower.config['num_hidden_layers']}."
    return key.startswith(last) or key == "cond_stage_model.model.text_projection"


def is_open_clip(tower: Tower) -> bool:
    """Whether single files name this encoder's weights as OpenCLIP does: those with its activation function do."""
    return tower.kind != "ldm-bert" and tower.config.get("hidden_act") == "gelu"


def original_names(blueprint: Blueprint, component: str, ours: Iterable[str]) -> dict[str, Origin]:
    """For each of our weights of a component, where it comes from in a single file with the original names."""
    if component == "unet":
        blocks = _unet_blocks(blueprint.unet)
        return {key: Origin(_UNET + _within_block(key, blocks, _UNET_INNER)) for key in ours}
    if component == blueprint.vae_component:
        blocks = _first_stage_blocks(blueprint.vae)
        return {key: Origin(_FIRST_STAGE + _within_block(key, blocks, _FIRST_STAGE_INNER)) for key in ours}
    index = [tower.component for tower in blueprint.towers].index(component)
    tower = blueprint.towers[index]
    is_xl = blueprint.family == "stable-diffusion-xl"
    prefix = f"conditioner.embedders.{index}." if is_xl else "cond_stage_model."
    if tower.kind == "ldm-bert":
        return {key: Origin(f"{prefix}transformer.{_ldm_bert_name(key)}") for key in ours}
    if is_open_clip(tower):
        return {key: _open_clip_origin(f"{prefix}model.", key) for key in ours}
    return {key: Origin(f"{prefix}transformer.text_model.{key}") for key in ours}


def averaged_name(origin: Origin) -> Origin:
    """Where the running average of a U-Net's weight lies: no dot stands in the name of a buffer of the original's."""
    name = origin.key.removeprefix("model.").replace(".", "")
    return dataclasses.replace(origin, key=f"model_ema.{name}")


def _within_block(key: str, blocks: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """Rename the block that a key lies in, then the layer within it."""
    for ours in sorted(blocks, key=len, reverse=True):
        if key.startswith(f"{ours}."):
            rest = key.removeprefix(f"{ours}.")
            return f"{blocks[ours]}.{_renamed(rest, inner)}"
    raise EngineError(f"{key} has no name in the original checkpoints")


_UNET_INNER = {
    r"norm1\.(?=weight$|bias$)": "in_layers.0.",
    r"conv1\.": "in_layers.2.",
    r"time_emb_proj\.": "emb_layers.1.",
    r"norm2\.(?=weight$|bias$)": "out_layers.0.",
    r"conv2\.": "out_layers.3.",
    r"conv_shortcut\.": "skip_connection.",
}
"""Layers of a residual block; those of a transformer are named alike."""


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


_FIRST_STAGE_INNER = {
    r"conv_shortcut\.": "nin_shortcut.",
    r"group_norm\.": "norm.",
    r"to_(q|k|v)\.": r"\1.",
    r"to_out\.0\.": "proj_out.",
}


def _first_stage_blocks(config: VAEConfig) -> dict[str, str]:
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


def _open_clip_origin(prefix: str, key: str) -> Origin:
    """OpenCLIP keeps queries, keys and values in one matrix, and its projection the other way round."""
    fixed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    if key == "text_projection.weight":
        return Origin(f"{prefix}text_projection", transposed=True)
    if key in fixed:
        return Origin(prefix + fixed[key])
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        raise EngineError(f"{key} has no name in the original checkpoints")
    block, layer, kind = f"{prefix}transformer.resblocks.{match[1]}.", match[2], match[3]
    thirds = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
    if layer in thirds:
        return Origin(f"{block}attn.in_proj_{kind}", third=thirds[layer])
    names = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    return Origin(f"{block}{names[layer]}.{kind}")


def _ldm_bert_name(key: str) -> str:
    """The original counts attention and feed-forward as layers of their own, each a norm (0) and a block (1)."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    if match is None:
        table = {r"token_embedding\.": "token_emb.", r"position_embedding\.": "pos_emb.emb."}
        return _renamed(key, table)
    attention, feed_forward = 2 * int(match[1]), 2 * int(match[1]) + 1
    return "attn_layers.layers." + _renamed(
        match[2],
        {
            r"attention_norm\.": f"{attention}.0.",
            r"attention\.": f"{attention}.1.",
            r"feed_forward_norm\.": f"{feed_forward}.0.",
            r"expand\.": f"{feed_forward}.1.net.0.0.",
            r"contract\.": f"{feed_forward}.1.net.2.",
        },
    )
