"""Random-weight model folders in the diffusers layout, written by diffusers and transformers themselves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CORPUS = ["a red circle left of a blue square on a white background, number 0123456789", "green star, yellow heart"]


def build_tokenizer(vocabulary: int = 400, max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer with a small vocabulary of its own."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocab = dict(trained["vocab"])
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        for token in (byte, byte + "</w>"):
            vocab.setdefault(token, len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token a byte."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[], model_max_length=77
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
    tokenizer: CLIPTokenizer | None = None,
    seed: int = 0,
) -> Path:
    """A Stable-Diffusion-1-like folder of small widths: the lowest U-Net level has no attention, as in the original.

    The autoencoder's factor is 2 ** (number of `vae_channels` - 1).
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    levels = len(unet_channels)
    tokenizer = tokenizer or byte_tokenizer()
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=vae_channels,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            scaling_factor=0.18215,
        ),
        "text_encoder": _text_encoder(tokenizer, context_dim),
        "unet": UNet2DConditionModel(
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
        "scheduler": DDIMScheduler(
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
    }
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers speaks of its own deprecations
        StableDiffusionPipeline(**parts, tokenizer=tokenizer, **unsafe).save_pretrained(folder)
    return folder


def write_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """The smallest that draws 256 x 256 in a blink: two levels, attention in the lower one, a few hundred words."""
    shallow = {
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return write_model(
        folder,
        unet_channels=(16, 32),
        vae_channels=(8, 8, 8, 8),
        context_dim=16,
        heads=2,
        unet=shallow,
        tokenizer=build_tokenizer(),
        seed=seed,
    )


def _text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
