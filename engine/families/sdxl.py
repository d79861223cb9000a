"""Stable Diffusion XL (arXiv:2307.01952): two CLIP encoders, and a U-Net that is also told pooled text and size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from latentmill.engine.families import compvis
from latentmill.engine.families.clip import ClipEncoder, clip_config, open_clip_config
from latentmill.engine.families.family import Family, Shapes, SingleFile, TextEncoderSpec
from latentmill.engine.types import GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "conditioner.embedders.{index}."
_FIRST, _SECOND = (_PREFIX.format(index=index) for index in range(2))
_ENCODER = ClipEncoder(component="text_encoder", tokenizer="tokenizer", penultimate=True)
_ENCODER_2 = ClipEncoder(component="text_encoder_2", tokenizer="tokenizer_2", penultimate=True, projection=True)


def _encoders(shapes: Shapes) -> tuple[TextEncoderSpec, ...]:
    # OpenCLIP pads with 0.
    second = replace(_ENCODER_2, config=open_clip_config(shapes, _SECOND), pad_id=0)
    return replace(_ENCODER, config=clip_config(shapes, _FIRST)), second


def _pooled_text_and_size(pooled: Tensor, request: GenerationRequest) -> Mapping[str, Tensor]:
    """Section 2.2's conditions of an uncropped picture: pooled states `(n, p)`, and time ids `(n, 6)`."""
    import torch
    from einops import repeat

    size = [request.height, request.width]
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=pooled.device)
    return {"pooled": pooled, "time_ids": repeat(time_ids, "1 ids -> n ids", n=len(pooled))}


FAMILY = Family(
    name="stable-diffusion-xl",
    pipelines=("StableDiffusionXLPipeline",),
    text_encoders=(_ENCODER, _ENCODER_2),
    denoiser=compvis.DENOISER,
    autoencoder=compvis.AUTOENCODER,
    single_files=(
        SingleFile(
            title="Stable Diffusion XL",
            markers=(compvis.UNET_MARKER, f"{_SECOND}model.token_embedding.weight"),
            denoiser=partial(
                compvis.unet_config, head_dim=64, sample_size=128, pooled=f"{_SECOND}model.text_projection"
            ),
            autoencoder=partial(compvis.vae_config, scaling_factor=0.13025, force_upcast=True),
            text_encoders=_encoders,
            scheduler=compvis.SCHEDULE,
        ),
    ),
    encoder_prefix=_PREFIX,
    ignored=(
        *compvis.IGNORED,
        r"conditioner\.embedders\.\d\.(transformer\.)?(text_model\.)?embeddings\.position_ids$",
        r"conditioner\.embedders\.\d\.(model\.)?logit_scale$",
        r"conditioner\.embedders\.\d\.model\.attn_mask$",
        # CLIP's projection into the space that it shares with pictures: only the second encoder's is used.
        r"conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?$",
    ),
    refused={
        f"{_FIRST}model.token_embedding.weight": (
            "the refiner of Stable Diffusion XL, which draws no picture from text alone"
        )
    },
    conditions=_pooled_text_and_size,
    zeros_for_empty_prompt=True,
)
