"""Random-weight model folders in the diffusers layout, written by the reference library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[], model_max_length=77
    )


def text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    end = len(tokenizer) - 1
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def write_model(
    folder: Path,
    *,
    unet_channels: tuple[int, ...] = (16, 32, 32),
    vae_channels: tuple[int, ...] = (8, 8, 16, 16),
    latent_channels: int = 4,
    context_dim: int = 32,
    heads: Any = 4,
    prediction_type: str = "epsilon",
    scheduler: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A Stable-Diffusion-1-like folder of small widths: the lowest U-Net level has no attention, as in the original."""
    torch.manual_seed(seed)
    levels = len(unet_channels)
    tokenizer = byte_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=vae_channels,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            scaling_factor=0.18215,
        ),
        text_encoder=text_encoder(tokenizer, context_dim),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **{
                "sample_size": 32,
                "in_channels": latent_channels,
                "out_channels": latent_channels,
                "block_out_channels": unet_channels,
                "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
                "attention_head_dim": heads,
                "cross_attention_dim": context_dim,
                "norm_num_groups": 8,
                **(unet or {}),
            }
        ),
        scheduler=DDIMScheduler(
            **{
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
                "prediction_type": prediction_type,
                **(scheduler or {}),
            }
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
