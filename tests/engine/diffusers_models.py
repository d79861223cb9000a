"""Random-weight folders of pipelines that the engine does not know itself, small, built without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from tokenizers import Tokenizer, models
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.harness.models import byte_tokenizer

LETTERS = [chr(code) for code in range(32, 127)]


def t5_tokenizer(length: int = 512) -> T5TokenizerFast:
    """One token a letter, and an end mark."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(tokenizer: Any, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def clip(tokenizer: Any, kind: type = CLIPTextModel, width: int = 64, **changes: Any) -> Any:
    end = len(tokenizer) - 1
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
            **changes,
        )
    ).eval()


def vae(latent_channels: int, levels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


FLUX_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL_SCHEDULER = {"shift": 1.0, "use_dynamic_shifting": False}


def write_flux(folder: Path, *, distilled: bool = True, **scheduler: Any) -> Path:
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = byte_tokenizer(), t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER | scheduler),
        vae=vae(4),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=1,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            guidance_embeds=distilled,
        ).eval(),
    ).save_pretrained(folder)
    return folder


def in_shards(folder: Path, place: Path) -> Path:
    """The same pipeline with its networks in several files each, as large ones are published."""
    DiffusionPipeline.from_pretrained(folder).save_pretrained(place, max_shard_size="40KB")
    return place


def write_sd3(folder: Path, *, has_t5: bool = True, channels: int = 4, **transformer: Any) -> Path:
    """`transformer` changes its config: 3.5 has norms of queries and keys, its medium size dual attention."""
    torch.manual_seed(1)
    tokenizer, tokenizer_2, tokenizer_3 = byte_tokenizer(), byte_tokenizer(), t5_tokenizer()
    tokenizer_2.pad_token = "!"
    encoder = clip(tokenizer, CLIPTextModelWithProjection)
    # As published: its authors do not project the first encoder's state.
    torch.nn.init.eye_(encoder.text_projection.weight)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(channels),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, CLIPTextModelWithProjection, hidden_act="gelu"),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5(tokenizer_3, 128) if has_t5 else None,
        tokenizer_3=tokenizer_3 if has_t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=channels,
            num_layers=3,
            attention_head_dim=64,
            num_attention_heads=1,
            joint_attention_dim=128,
            caption_projection_dim=64,
            pooled_projection_dim=128,
            out_channels=channels,
            pos_embed_max_size=16,
            **transformer,
        ).eval(),
    ).save_pretrained(folder)
    return folder


def write_pixart(folder: Path) -> Path:
    torch.manual_seed(2)
    tokenizer = t5_tokenizer()
    PixArtSigmaPipeline(
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(4),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=PixArtTransformer2DModel(
            sample_size=32,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=32,
            caption_channels=32,
            use_additional_conditions=False,
        ).eval(),
    ).save_pretrained(folder)
    return folder


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, with a chat template, as language models have."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n"]
    vocabulary = {symbol: number for number, symbol in enumerate([*marks, *LETTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def write_z_image(folder: Path) -> Path:
    """A language model as text encoder, whose states are as many as the prompt has tokens."""
    torch.manual_seed(3)
    tokenizer = chat_tokenizer()
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            )
        ).eval(),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ).eval(),
    ).save_pretrained(folder)
    return folder


WRITERS = {"flux": write_flux, "sd3": write_sd3, "pixart": write_pixart, "z-image": write_z_image}
