"""Checkpoints in one file with the original key names: which model one holds, told from its keys and shapes.

What shapes do not tell (heads, activations, schedule) are facts of the published families, written down here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentmill.engine.loading.blueprint import Blueprint, Family, Tower, check_fit
from latentmill.engine.loading.checkpoint import Shape, WeightsFile
from latentmill.engine.loading.config import PredictionType, SchedulerConfig, UNetConfig, VAEConfig
from latentmill.engine.loading.encoder_config import clip_text_config, ldm_bert_config
from latentmill.engine.loading.files import shown
from latentmill.engine.types import EngineError

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
BERT_TOKENIZER = "bert-base-uncased"

_UNET = "model.diffusion_model."
_SCHEDULE = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Published:
    """What every checkpoint of one family has in common and no shape shows."""

    name: str
    marker: str
    family: Family
    scaling_factor: float
    heads: int | None = None
    head_dim: int | None = None
    sample_size: int = 64
    betas: tuple[float, float] = (0.00085, 0.012)
    force_upcast: bool = False


_SD1 = _Published(
    name="Stable Diffusion 1",
    marker="cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    family="stable-diffusion",
    scaling_factor=0.18215,
    heads=8,
)
_SD2 = _Published(
    name="Stable Diffusion 2",
    marker="cond_stage_model.model.token_embedding.weight",
    family="stable-diffusion",
    scaling_factor=0.18215,
    head_dim=64,
    sample_size=96,
)
_SDXL = _Published(
    name="Stable Diffusion XL",
    marker="conditioner.embedders.1.model.token_embedding.weight",
    family="stable-diffusion-xl",
    scaling_factor=0.13025,
    head_dim=64,
    sample_size=128,
    force_upcast=True,
)
_LDM_KL = _Published(
    name="latent diffusion text2img",
    marker="cond_stage_model.transformer.token_emb.weight",
    family="latent-diffusion",
    scaling_factor=0.18215,
    heads=8,
    sample_size=32,
)
_LDM_VQ = _Published(
    name="latent diffusion text2img with a VQ first stage",
    marker="first_stage_model.quantize.embedding.weight",
    family="latent-diffusion",
    scaling_factor=1.0,
    head_dim=32,
    betas=(0.0015, 0.0195),
)
_REFINER = "conditioner.embedders.0.model.token_embedding.weight"


def recognise(file: WeightsFile, prediction_type: str | None) -> Blueprint:
    """The architecture of a single file. Raises EngineError where it is unknown, or says what was looked for."""
    published = _published(file)
    shapes = file.shapes
    try:
        blueprint = Blueprint(
            family=published.family,
            unet=UNetConfig.from_dict(_unet_config(shapes, published), str(file.path)),
            vae=VAEConfig.from_dict(_vae_config(shapes, published), str(file.path)),
            scheduler=SchedulerConfig.from_dict(
                {
                    **_SCHEDULE,
                    "beta_start": published.betas[0],
                    "beta_end": published.betas[1],
                    "steps_offset": 1,
                    "rescale_betas_zero_snr": "ztsnr" in file.shapes,
                    "prediction_type": prediction_type or _prediction_type(file, published),
                }
            ),
            towers=_towers(shapes, published, str(file.path)),
            force_zeros_for_empty_prompt=published is _SDXL,
        )
    except KeyError as error:
        raise EngineError(f"{file.path} looks like {published.name}, but has no key {error}") from None
    except EngineError:
        raise
    except (IndexError, ValueError) as error:
        raise EngineError(
            f"{file.path} looks like {published.name}, but its tensors have not the shapes of one: {error}"
        ) from None
    check_fit(blueprint, file.path)
    return blueprint


def _published(file: WeightsFile) -> _Published:
    if _REFINER in file.shapes and _SDXL.marker not in file.shapes:
        raise EngineError(f"{file.path} is the refiner of Stable Diffusion XL, which draws no picture from text alone")
    has_unet = f"{_UNET}input_blocks.0.0.weight" in file.shapes
    for published in (_SD1, _SD2, _SDXL, _LDM_KL):
        if has_unet and published.marker in file.shapes:
            return _LDM_VQ if published is _LDM_KL and _LDM_VQ.marker in file.shapes else published
    raise EngineError(
        f"{file.path} is not a checkpoint that this version knows ({len(file.shapes)} tensors, first "
        f"{shown(next(iter(file.shapes), None))}): looked for {_UNET}input_blocks.0.0.weight and one of "
        f"{', '.join(published.marker for published in (_SD1, _SD2, _SDXL, _LDM_KL))}"
    )


def _prediction_type(file: WeightsFile, published: _Published) -> PredictionType:
    remark = file.metadata.get("modelspec.prediction_type")
    if remark in ("v", "v_prediction") or "v_pred" in file.shapes:
        return "v_prediction"
    if remark == "epsilon" or published is not _SD2:
        return "epsilon"
    raise EngineError(
        f"{file.path} is {published.name}, whose files do not say what the U-Net predicts; give prediction_type: "
        "v_prediction for a 768-v model, epsilon for a 512-base or Turbo model"
    )


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """One more than the highest number that the pattern's group takes among the keys; 0 if it matches none.

    Patterns take three digits: a key with more is none of a known model, and is refused as unexpected.
    """
    expression = re.compile(pattern)
    return 1 + max((int(match[1]) for match in map(expression.match, shapes) if match), default=-1)


def _unet_config(shapes: Mapping[str, Shape], published: _Published) -> dict[str, Any]:
    """Walk the way down: a residual block starts a layer, `.0.op` ends a level."""
    levels: list[dict[str, int]] = [{"width": 0, "layers": 0, "depth": 0}]
    for number in range(1, _count(shapes, re.escape(_UNET) + r"input_blocks\.(\d{1,3})\.")):
        block = f"{_UNET}input_blocks.{number}."
        if f"{block}0.op.weight" in shapes:
            levels.append({"width": 0, "layers": 0, "depth": 0})
            continue
        levels[-1]["width"] = shapes[f"{block}0.out_layers.3.weight"][0]
        levels[-1]["layers"] += 1
        levels[-1]["depth"] = _count(shapes, re.escape(block) + r"1\.transformer_blocks\.(\d{1,3})\.")
    middle = f"{_UNET}middle_block.1."
    widths = [level["width"] for level in levels]
    depths = [level["depth"] for level in levels]
    config: dict[str, Any] = {
        "in_channels": shapes[f"{_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{_UNET}out.2.weight"][0],
        "sample_size": published.sample_size,
        "block_out_channels": widths,
        "layers_per_block": levels[0]["layers"],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # A level without attention has no depth; the lowest level's counts for the middle block.
        "transformer_layers_per_block": [
            *(depth or 1 for depth in depths[:-1]),
            _count(shapes, re.escape(middle) + r"transformer_blocks\.(\d{1,3})\."),
        ],
        "attention_head_dim": published.heads or [width // (published.head_dim or 1) for width in widths],
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{middle}proj_in.weight"]) == 2,
    }
    if f"{_UNET}label_emb.0.0.weight" in shapes:
        pooled = shapes["conditioner.embedders.1.model.text_projection"][1]
        features = shapes[f"{_UNET}label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (features - pooled) // 6,
            "projection_class_embeddings_input_dim": features,
        }
    return config


def _vae_config(shapes: Mapping[str, Shape], published: _Published) -> dict[str, Any]:
    down = r"first_stage_model\.encoder\.down\."
    levels = _count(shapes, down + r"(\d{1,3})\.block\.")
    attends = [f"first_stage_model.encoder.down.{level}.attn.0.norm.weight" in shapes for level in range(levels)]
    codebook = shapes.get(_LDM_VQ.marker)
    config: dict[str, Any] = {
        "block_out_channels": [
            shapes[f"first_stage_model.encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)
        ],
        "down_block_types": ["AttnDownEncoderBlock2D" if level else "DownEncoderBlock2D" for level in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if level else "UpDecoderBlock2D" for level in reversed(attends)],
        "layers_per_block": _count(shapes, down + r"0\.block\.(\d{1,3})\."),
        "latent_channels": shapes["first_stage_model.decoder.conv_in.weight"][1],
        "mid_block_add_attention": "first_stage_model.decoder.mid.attn_1.norm.weight" in shapes,
        "scaling_factor": published.scaling_factor,
        "force_upcast": published.force_upcast,
    }
    if codebook is not None:
        config |= {"num_vq_embeddings": codebook[0], "vq_embed_dim": codebook[1]}
    return config


def _towers(shapes: Mapping[str, Shape], published: _Published, where: str) -> tuple[Tower, ...]:
    return tuple(
        replace(tower, config=(ldm_bert_config if tower.kind == "ldm-bert" else clip_text_config)(tower.config, where))
        for tower in _towers_by_shapes(shapes, published)
    )


def _towers_by_shapes(shapes: Mapping[str, Shape], published: _Published) -> tuple[Tower, ...]:
    if published is _SD1:
        return (_clip_tower(shapes, "cond_stage_model.transformer.text_model.", "text_encoder", penultimate=False),)
    if published is _SD2:
        # One layer less than the file has, then the final norm: what its builders call penultimate.
        tower = _open_clip_tower(shapes, "cond_stage_model.model.", "text_encoder", unused_layers=1)
        return (tower,)
    if published is _SDXL:
        first = "conditioner.embedders.0.transformer.text_model."
        return (
            _clip_tower(shapes, first, "text_encoder", penultimate=True),
            _open_clip_tower(shapes, "conditioner.embedders.1.model.", "text_encoder_2", unused_layers=0),
        )
    prefix = "cond_stage_model.transformer."
    inner, width = shapes[f"{prefix}attn_layers.layers.0.1.to_q.weight"]
    config = {
        "vocab_size": shapes[f"{prefix}token_emb.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}pos_emb.emb.weight"][0],
        "encoder_layers": _count(shapes, re.escape(prefix) + r"attn_layers\.layers\.(\d{1,3})\.") // 2,
        "encoder_ffn_dim": shapes[f"{prefix}attn_layers.layers.1.1.net.0.0.weight"][0],
        "encoder_attention_heads": inner // 64,
        "head_dim": 64,
        "d_model": width,
    }
    return (Tower(kind="ldm-bert", config=config, component="bert", tokenizer="tokenizer"),)


def _clip_tower(shapes: Mapping[str, Shape], prefix: str, component: str, *, penultimate: bool) -> Tower:
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d{1,3})\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        # As published; the pooled state, which these two are about, is not asked for.
        "projection_dim": width,
        "eos_token_id": 2,
    }
    return Tower(kind="clip", config=config, component=component, tokenizer="tokenizer", penultimate=penultimate)


def _open_clip_tower(shapes: Mapping[str, Shape], prefix: str, component: str, *, unused_layers: int) -> Tower:
    vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _count(shapes, re.escape(prefix) + r"transformer\.resblocks\.(\d{1,3})\.") - unused_layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes[f"{prefix}positional_embedding"][0],
        "hidden_act": "gelu",
        "projection_dim": shapes[f"{prefix}text_projection"][1] if unused_layers == 0 else width,
        # The pooled state is that of the highest token, which is the end mark: transformers' rule for this number.
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    return Tower(
        kind="clip" if unused_layers else "clip-projection",
        config=config,
        component=component,
        tokenizer="tokenizer",
        penultimate=unused_layers == 0,
        pad_id=0,
    )


def default_tokenizer(blueprint: Blueprint) -> str:
    """The hub id of the tokenizer that a family was trained with: its vocabulary is in no checkpoint."""
    return BERT_TOKENIZER if blueprint.family == "latent-diffusion" else CLIP_TOKENIZER


def is_single_file(path: Path) -> bool:
    """Whether a path names a checkpoint in one file."""
    return path.is_file()
