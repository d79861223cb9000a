"""Random-weight models of each family, written by the reference libraries, and the reference's pictures of them.

Widths are small but keep the published proportions: 64 features a head, groups of 32 channels, so that single files,
whose shapes are all that tells their architecture, can be read at these widths too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from latentmill.engine import Engine, GenerationRequest
from tests.harness.models import byte_tokenizer

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PROMPTS = ["a red cat", "two dogs on a hill", "", "a very long prompt " * 9]


def clip(tokenizer: CLIPTokenizer, width: int, layers: int, *, projection: bool = False, **changes: Any) -> Any:
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": width // 64,
                "projection_dim": width,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 1,
                # Weights of the published scale leave every token nearly alike at these widths.
                "initializer_factor": 2.0,
                **changes,
            }
        )
    )


def unet(channels: tuple[int, ...], context: int, attends: tuple[bool, ...], **changes: Any) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if level else "DownBlock2D" for level in attends]
    up = ["CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends)]
    config = {"sample_size": 8, "block_out_channels": channels, "cross_attention_dim": context, "layers_per_block": 1}
    return UNet2DConditionModel(**{**config, "down_block_types": down, "up_block_types": up, **changes})


def autoencoder(scaling_factor: float, **changes: Any) -> AutoencoderKL:
    levels = 3
    return AutoencoderKL(
        **{
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": 2,
            "scaling_factor": scaling_factor,
            **changes,
        }
    )


def write_sd1(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    return _save_sd(
        folder,
        tokenizer,
        clip(tokenizer, 64, 2),
        unet((32, 64, 64, 64), 64, (True, True, True, False), attention_head_dim=8),
    )


def write_sd2(folder: Path, prediction_type: str = "v_prediction") -> Path:
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "!"
    denoiser = unet(
        (64, 128, 128),
        128,
        (True, True, False),
        attention_head_dim=[1, 2, 2],
        use_linear_projection=True,
        upcast_attention=True,
    )
    return _save_sd(folder, tokenizer, clip(tokenizer, 128, 2, hidden_act="gelu"), denoiser, prediction_type)


def _save_sd(
    folder: Path, tokenizer: CLIPTokenizer, encoder: Any, denoiser: Any, prediction_type: str = "epsilon"
) -> Path:
    StableDiffusionPipeline(
        vae=autoencoder(0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path, *, force_zeros: bool = True, spacing: str = "leading") -> Path:
    torch.manual_seed(3)
    first, second = byte_tokenizer(), byte_tokenizer()
    second.pad_token = "!"
    pooled, ids = 128, 32
    StableDiffusionXLPipeline(
        vae=autoencoder(0.13025, force_upcast=True),
        text_encoder=clip(first, 64, 3),
        text_encoder_2=clip(second, pooled, 3, projection=True, hidden_act="gelu"),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(
            (64, 64, 128),
            64 + pooled,
            (False, True, True),
            attention_head_dim=[1, 1, 2],
            transformer_layers_per_block=[1, 2, 3],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=ids,
            projection_class_embeddings_input_dim=pooled + 6 * ids,
        ),
        scheduler=DDIMScheduler(**SCHEDULE, timestep_spacing=spacing),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def bert_tokenizer(folder: Path) -> BertTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "red", "dogs", "on", "hill"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*words, *letters, *(f"##{letter}" for letter in letters)]) + "\n")
    return BertTokenizer.from_pretrained(folder, model_max_length=77)


def ldm_bert(vocabulary: int, width: int, layers: int) -> LDMBertModel:
    config = LDMBertConfig(
        vocab_size=vocabulary,
        encoder_layers=layers,
        d_model=width,
        encoder_ffn_dim=4 * width,
        encoder_attention_heads=8,
        head_dim=64,
        init_std=0.3,
    )
    return LDMBertModel(config).eval()


def autoencoder_of(kind: str) -> Any:
    """`kl` with f=8, `vq` with f=4, or `vq-f8`: a codebook, and attention at the lowest level."""
    levels = 3 if kind == "vq" else 4
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    channels = (*(32,) * (levels - 1), 64)
    if kind == "kl":
        return autoencoder(0.18215, block_out_channels=channels, down_block_types=down, up_block_types=up)
    if kind == "vq-f8":
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    model = VQModel(
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        latent_channels=3 if kind == "vq" else 4,
        num_vq_embeddings=61,
        scaling_factor=1.0,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def write_ldm(folder: Path, kind: str = "kl", *, legacy_weights: bool = False) -> Path:
    torch.manual_seed(4)
    tokenizer = bert_tokenizer(folder / "tokenizer")
    vqvae = autoencoder_of(kind)
    is_kl = kind == "kl"
    channels = vqvae.config.latent_channels
    denoiser = unet(
        (32, 64, 64) if is_kl else (32, 64, 96),
        64,
        (True, True, False) if is_kl else (False, True, True),
        in_channels=channels,
        out_channels=channels,
        attention_head_dim=8 if is_kl else [1, 2, 3],
    )
    betas = {} if is_kl else {"beta_start": 0.0015, "beta_end": 0.0195}
    LDMTextToImagePipeline(
        vqvae=vqvae,
        bert=ldm_bert(len(tokenizer), 64, 2),
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(**{**SCHEDULE, **betas}),
    ).save_pretrained(folder, safe_serialization=not legacy_weights)
    return folder


def requests(side: int, *, guidance_scale: float = 5.0, steps: int = 4, **changes: Any) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            **{
                "prompt": prompt,
                "seed": seed,
                "width": 2 * side,
                "height": side,
                "num_inference_steps": steps,
                "guidance_scale": guidance_scale,
                **changes,
            }
        )
        for seed, prompt in enumerate(PROMPTS)
    ]


def reference_pictures(pipeline: DiffusionPipeline, rows: list[GenerationRequest]) -> np.ndarray:
    """What diffusers draws for the same requests, from the same noise: `(n, h, w, 3) uint8`."""
    pipeline.set_progress_bar_config(disable=True)
    first = rows[0]
    extra: dict[str, Any] = {}
    stretch = 1
    if isinstance(pipeline, LDMTextToImagePipeline):
        # It takes f=8 for granted, also with an autoencoder of f=4.
        stretch = 8 // pipeline.vae_scale_factor
    elif first.negative_prompt:
        extra["negative_prompt"] = [row.negative_prompt for row in rows]
    pictures = pipeline(
        [row.prompt for row in rows],
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        width=stretch * first.width,
        height=stretch * first.height,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        output_type="np",
        **extra,
    ).images
    return (pictures * 255).round().astype(np.uint8)


def assert_same_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    """Within one grey level on 99.9 % of the values, and pictures worth comparing."""
    assert min(picture.std() for picture in expected) > 5, "a flat picture proves nothing"
    assert len({picture.tobytes() for picture in expected}) == len(expected), "the prompt or seed has no effect"
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert (difference <= 1).mean() >= 0.999, f"{(difference > 1).mean():.2%} of values differ, by {difference.max()}"


def assert_same_unet(engine: Engine, pipeline: DiffusionPipeline) -> None:
    """The network's output within 1e-4 of the reference's, relative to its largest value."""
    ours, config = engine._models.denoiser, engine._models.denoiser.config
    torch.manual_seed(0)
    latents, timesteps = torch.randn(2, config.in_channels, 8, 16), torch.tensor([10, 700])
    context = torch.randn(2, 77, config.context_dim)
    extra: dict[str, Any] = {}
    if config.projection_input_dim is not None:
        pooled = torch.randn(2, config.projection_input_dim - 6 * config.addition_time_embed_dim)
        extra = {"pooled": pooled, "time_ids": torch.tensor([[32.0, 64, 0, 0, 32, 64]] * 2)}
    conditions = {"text_embeds": extra["pooled"], "time_ids": extra["time_ids"]} if extra else None
    with torch.inference_mode():
        expected = pipeline.unet(latents, timesteps, context, added_cond_kwargs=conditions).sample
        found = ours(latents, timesteps, context, **extra)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
