"""The shapes of the embedded model's parts, as the config files of the diffusers folder say them."""

from __future__ import annotations

from typing import Any

LATENT_CHANNELS = 8
FACTOR = 16  # pixels per latent cell
CONTEXT_DIM = 128
VOCABULARY = 1024  # words of the tokenizer, at most
MODEL_MAX_LENGTH = 77

# Few GroupNorm groups in both networks: a group of few channels normalises the picture's absolute colour away.
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 32, 64, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "force_upcast": False,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "sample_size": 256,
    "scaling_factor": 1.0,  # the recipe folds the latents' mean and deviation into the 1x1 convolutions
}

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [48, 96, 160],
    "center_input_sample": False,
    "cross_attention_dim": CONTEXT_DIM,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "sample_size": 16,
}

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # diffusers warns about anything else; trailing spacing does not use it
    "thresholding": False,
    "timestep_spacing": "trailing",
}

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": CONTEXT_DIM,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": CONTEXT_DIM,
    "max_position_embeddings": MODEL_MAX_LENGTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
