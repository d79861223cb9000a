"""The model folder's JSON files as typed values; every switch that is read here is honoured, any other is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from latentmill.engine.types import EngineError

Json = Mapping[str, Any]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "original"]


def _refuse_other_than(config: Json, part: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a switch whose effect is not built, instead of ignoring it and drawing wrong pictures."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise EngineError(
                f"{part}/config.json has {name}={config[name]!r}, which this engine does not build; "
                f"it supports {', '.join(map(repr, values))}"
            )


def _per_level(value: Any, levels: int, name: str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * levels
    if len(value) != levels or not all(isinstance(entry, int) for entry in value):
        raise EngineError(
            f"unet/config.json has {name}={value!r}: expected one whole number per level ({levels} levels)"
        )
    return tuple(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Shape of the denoising U-Net with cross-attention (arXiv:2112.10752, section 3.3), as in `unet/config.json`.

    All tuples go from the highest resolution to the lowest. `heads` counts attention heads: the JSON's
    `attention_head_dim` means heads in every published model of this family. `linear_projection` tells the form in
    which files hold the projections around transformers; the network has linear ones either way.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers_per_block: int
    heads: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    cross_attention: tuple[bool, ...]
    context_dim: int
    sample_size: int
    norm_groups: int
    norm_eps: float
    linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: int
    addition_time_embed_dim: int | None
    projection_input_dim: int | None

    @classmethod
    def from_dict(cls, config: Json) -> UNetConfig:
        """Parse diffusers' `UNet2DConditionModel` config. Raises EngineError for a switch that is not supported."""
        _refuse_other_than(
            config,
            "unet",
            {
                "act_fn": ("silu", "swish"),
                "addition_embed_type": (None, "text_time"),
                "attention_type": ("default",),
                "center_input_sample": (False,),
                "class_embed_type": (None,),
                "conv_in_kernel": (3,),
                "conv_out_kernel": (3,),
                "cross_attention_norm": (None,),
                "downsample_padding": (1,),
                "dual_cross_attention": (False,),
                "encoder_hid_dim_type": (None,),
                "mid_block_scale_factor": (1, 1.0),
                "mid_block_type": ("UNetMidBlock2DCrossAttn",),
                "num_class_embeds": (None,),
                "only_cross_attention": (False,),
                "resnet_out_scale_factor": (1, 1.0),
                "resnet_skip_time_act": (False,),
                "resnet_time_scale_shift": ("default",),
                "reverse_transformer_layers_per_block": (None,),
                "time_cond_proj_dim": (None,),
                "time_embedding_act_fn": (None,),
                "time_embedding_dim": (None,),
                "time_embedding_type": ("positional",),
                "timestep_post_act": (None,),
            },
        )
        channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
        levels = len(channels)
        down = config.get("down_block_types", ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",))
        up = config.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1))
        kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
        unknown = [kind for kind in (*down, *up) if kind not in kinds]
        if unknown or len(down) != levels or [kinds[kind] for kind in down] != [kinds[kind] for kind in reversed(up)]:
            raise EngineError(
                f"unet/config.json has down_block_types={list(down)!r} and up_block_types={list(up)!r}: "
                f"expected {levels} mirrored levels out of {', '.join(kinds)}"
            )
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        context_dim = config.get("cross_attention_dim", 1280)
        if not isinstance(context_dim, int):
            raise EngineError(f"unet/config.json has cross_attention_dim={context_dim!r}: expected one whole number")
        return cls(
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            channels=channels,
            layers_per_block=config.get("layers_per_block", 2),
            heads=_per_level(heads, levels, "attention_head_dim"),
            transformer_layers=_per_level(
                config.get("transformer_layers_per_block", 1), levels, "transformer_layers_per_block"
            ),
            cross_attention=tuple(kinds[kind] for kind in down),
            context_dim=context_dim,
            sample_size=config.get("sample_size") or 64,
            norm_groups=config.get("norm_num_groups", 32),
            norm_eps=config.get("norm_eps", 1e-5),
            linear_projection=bool(config.get("use_linear_projection", False)),
            flip_sin_to_cos=config.get("flip_sin_to_cos", True),
            freq_shift=config.get("freq_shift", 0),
            addition_time_embed_dim=(
                config.get("addition_time_embed_dim") if config.get("addition_embed_type") == "text_time" else None
            ),
            projection_input_dim=(
                config.get("projection_class_embeddings_input_dim")
                if config.get("addition_embed_type") == "text_time"
                else None
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Shape of the first stage, the KL-regularised autoencoder (arXiv:2112.10752, section 3.1; `vae/config.json`)."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_groups: int
    scaling_factor: float
    shift_factor: float
    force_upcast: bool
    mid_attention: bool
    attention: tuple[bool, ...]
    codebook_size: int | None
    codebook_dim: int

    @property
    def unet_channels(self) -> int:
        """Channels of the latents that the second stage works on."""
        return self.latent_channels if self.codebook_size is None else self.codebook_dim

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side: the paper's f."""
        return int(2 ** (len(self.channels) - 1))

    @classmethod
    def from_dict(cls, config: Json) -> VAEConfig:
        """Parse diffusers' `AutoencoderKL` or `VQModel` config. Raises EngineError for an unsupported switch."""
        _refuse_other_than(
            config,
            "vae",
            {
                "act_fn": ("silu", "swish"),
                "use_quant_conv": (True,),
                "use_post_quant_conv": (True,),
                "latents_mean": (None,),
                "latents_std": (None,),
                "norm_type": ("group",),
                "lookup_from_codebook": (False,),
            },
        )
        channels = tuple(config.get("block_out_channels", (64,)))
        is_vq = config.get("_class_name") == "VQModel" or "num_vq_embeddings" in config
        latent_channels = config.get("latent_channels", 3 if is_vq else 4)
        return cls(
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            channels=channels,
            layers_per_block=config.get("layers_per_block", 1),
            latent_channels=latent_channels,
            norm_groups=config.get("norm_num_groups", 32),
            # Early folders leave the factor out; 0.18215 is the one that their pipelines multiplied by.
            scaling_factor=config.get("scaling_factor", 0.18215),
            shift_factor=config.get("shift_factor") or 0.0,
            force_upcast=bool(config.get("force_upcast", False)),
            mid_attention=config.get("mid_block_add_attention", True),
            attention=_levels_with_attention(config, len(channels)),
            codebook_size=config.get("num_vq_embeddings", 256) if is_vq else None,
            codebook_dim=config.get("vq_embed_dim") or latent_channels,
        )


def _levels_with_attention(config: Json, levels: int) -> tuple[bool, ...]:
    """Which levels of the first stage have attention of their own, from the highest resolution to the lowest."""
    down = config.get("down_block_types", ("DownEncoderBlock2D",) * levels)
    up = config.get("up_block_types", ("UpDecoderBlock2D",) * levels)
    kinds = {
        "DownEncoderBlock2D": False,
        "AttnDownEncoderBlock2D": True,
        "UpDecoderBlock2D": False,
        "AttnUpDecoderBlock2D": True,
    }
    found = [kinds.get(kind) for kind in down]
    if None in found or len(down) != levels or found != [kinds.get(kind) for kind in reversed(up)]:
        raise EngineError(
            f"vae/config.json has down_block_types={list(down)!r} and up_block_types={list(up)!r}: "
            f"expected {levels} mirrored levels out of {', '.join(kinds)}"
        )
    return tuple(map(bool, found))


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """The folder's `scheduler/scheduler_config.json`, less its `_class_name`: the sampler is the user's choice.

    The last two belong to models distilled for few steps (arXiv:2310.04378). The spacing `original` is no folder's, but
    that of the original command: it is asked for by `ModelSpec.timestep_spacing`.
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None
    rescale_betas_zero_snr: bool
    prediction_type: PredictionType
    timestep_spacing: TimestepSpacing
    steps_offset: int
    set_alpha_to_one: bool
    clip_sample: bool
    clip_sample_range: float
    original_inference_steps: int
    timestep_scaling: float

    @classmethod
    def from_dict(cls, config: Json) -> SchedulerConfig:
        """Parse a diffusers scheduler config. Raises EngineError for a switch that is not supported.

        What only says how to sample (Karras sigmas, the solver's order) is not read: the sampler's name says that.
        """
        _refuse_other_than(
            config,
            "scheduler",
            {
                "thresholding": (False,),
                "prediction_type": ("epsilon", "v_prediction", "sample"),
                "timestep_spacing": get_args(TimestepSpacing),
                "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
                "timestep_type": ("discrete",),
                "interpolation_type": ("linear",),
                "sigma_min": (None,),
                "sigma_max": (None,),
                "use_flow_sigmas": (False,),
            },
        )
        trained = config.get("trained_betas")
        kind = config.get("_class_name", "DDIMScheduler")
        return cls(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            beta_schedule=config.get("beta_schedule", "linear"),
            trained_betas=None if trained is None else tuple(trained),
            rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get("timestep_spacing", _DEFAULT_SPACING.get(kind, "leading")),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", kind == "DDIMScheduler"),
            clip_sample=config.get("clip_sample", kind in ("DDIMScheduler", "DDPMScheduler")),
            clip_sample_range=config.get("clip_sample_range", 1.0),
            original_inference_steps=config.get("original_inference_steps", 50),
            timestep_scaling=config.get("timestep_scaling", 10.0),
        )


_DEFAULT_SPACING: dict[str, TimestepSpacing] = {
    "EulerDiscreteScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
}
"""What each diffusers class assumes when its config file says nothing; every other class assumes `leading`."""
