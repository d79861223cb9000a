"""The configs of the U-Net and the autoencoder as typed values. A switch whose effect is not built is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentmill.engine.loading.fields import Fields, refuse_other_than
from latentmill.engine.loading.files import shown
from latentmill.engine.types import EngineError

Json = Mapping[str, Any]
LEVELS_LIMIT = 8
LAYERS_LIMIT = 64
WIDTH_LIMIT = 2**15
GROUPS_LIMIT = 2**10
CELLS_LIMIT = 2**13
CODES_LIMIT = 2**20
BLOCKS_LIMIT = 256
"""What a network may have at most: levels, layers of one block, features of one layer, groups of a norm, cells along a
side, codes, and transformer layers of a U-Net's way down. Each is far above what was published.
"""


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

    @property
    def pooled_dim(self) -> int | None:
        """Features of the pooled state: what its added embedding takes beside six embedded numbers (SDXL)."""
        if self.addition_time_embed_dim is None or self.projection_input_dim is None:
            return None
        return self.projection_input_dim - 6 * self.addition_time_embed_dim

    @property
    def patch_size(self) -> int:
        """It works on single cells."""
        return 1

    @property
    def side_limit(self) -> int | None:
        """It takes latents of any size."""
        return None

    @property
    def distilled_guidance(self) -> bool:
        """It knows guidance by the unconditional pass alone."""
        return False

    @classmethod
    def from_dict(cls, config: Json, where: str = "unet/config.json") -> UNetConfig:
        """Parse diffusers' `UNet2DConditionModel` config. Raises EngineError for a switch that is not supported."""
        refuse_other_than(
            config,
            where,
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
        fields = Fields(config, where)
        channels = fields.wholes("block_out_channels", (320, 640, 1280, 1280), WIDTH_LIMIT, length=LEVELS_LIMIT)
        levels = len(channels)
        down = config.get("down_block_types", ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",))
        up = config.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1))
        kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
        layers = fields.whole("layers_per_block", 2, LAYERS_LIMIT)
        depths = fields.per_level("transformer_layers_per_block", 1, LAYERS_LIMIT, levels=levels)
        if layers * sum(depths) > BLOCKS_LIMIT:
            raise fields.refusal(
                "transformer_layers_per_block", f"at most {BLOCKS_LIMIT} layers in all, of {layers} blocks a level"
            )
        # Early folders call the number of heads by the name of their dimension.
        heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        has_text_time = config.get("addition_embed_type") == "text_time"
        return cls(
            in_channels=fields.whole("in_channels", 4, WIDTH_LIMIT),
            out_channels=fields.whole("out_channels", 4, WIDTH_LIMIT),
            channels=channels,
            layers_per_block=layers,
            heads=fields.per_level(heads, 8, WIDTH_LIMIT, levels=levels),
            transformer_layers=depths,
            cross_attention=_mirrored_levels(down, up, kinds, levels, where),
            context_dim=fields.whole("cross_attention_dim", 1280, WIDTH_LIMIT),
            sample_size=fields.whole("sample_size", 64, CELLS_LIMIT),
            norm_groups=_groups(fields, channels),
            norm_eps=fields.number("norm_eps", 1e-5, 1.0),
            linear_projection=fields.flag("use_linear_projection", default=False),
            flip_sin_to_cos=fields.flag("flip_sin_to_cos", default=True),
            freq_shift=fields.whole("freq_shift", 0, 1, least=0),
            addition_time_embed_dim=(
                fields.whole("addition_time_embed_dim", None, WIDTH_LIMIT) if has_text_time else None
            ),
            projection_input_dim=(
                fields.whole("projection_class_embeddings_input_dim", None, WIDTH_LIMIT) if has_text_time else None
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Shape of the autoencoder, with KL or a codebook (arXiv:2112.10752, section 3.1), as in `vae/config.json`.

    `quant_conv` tells whether there are 1x1 convolutions between its two halves: later models have none.
    """

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
    quant_conv: bool

    @property
    def denoiser_channels(self) -> int:
        """Channels of the latents that the denoiser works on."""
        return self.latent_channels if self.codebook_size is None else self.codebook_dim

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side: the paper's f."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def decoder_width(self) -> int:
        """Features per pixel of the largest activation while decoding.

        The last level but one is upsampled to full size before its channels become those of the last.
        """
        return max(self.channels[:2])

    @classmethod
    def from_dict(cls, config: Json, where: str = "vae/config.json") -> VAEConfig:
        """Parse diffusers' `AutoencoderKL` or `VQModel` config. Raises EngineError for an unsupported switch."""
        refuse_other_than(
            config,
            where,
            {
                "act_fn": ("silu", "swish"),
                "use_post_quant_conv": (config.get("use_quant_conv", True),),
                "latents_mean": (None,),
                "latents_std": (None,),
                "norm_type": ("group",),
                "lookup_from_codebook": (False,),
            },
        )
        fields = Fields(config, where)
        channels = fields.wholes("block_out_channels", (64,), WIDTH_LIMIT, length=LEVELS_LIMIT)
        levels = len(channels)
        down = config.get("down_block_types", ("DownEncoderBlock2D",) * levels)
        up = config.get("up_block_types", ("UpDecoderBlock2D",) * levels)
        kinds = {
            "DownEncoderBlock2D": False,
            "AttnDownEncoderBlock2D": True,
            "UpDecoderBlock2D": False,
            "AttnUpDecoderBlock2D": True,
        }
        is_vq = config.get("_class_name") == "VQModel" or "num_vq_embeddings" in config
        latent_channels = fields.whole("latent_channels", 3 if is_vq else 4, WIDTH_LIMIT)
        return cls(
            in_channels=fields.whole("in_channels", 3, WIDTH_LIMIT),
            out_channels=fields.whole("out_channels", 3, WIDTH_LIMIT),
            channels=channels,
            layers_per_block=fields.whole("layers_per_block", 1, LAYERS_LIMIT),
            latent_channels=latent_channels,
            norm_groups=_groups(fields, channels),
            # Early folders leave the factor out; 0.18215 is the one that their pipelines multiplied by.
            scaling_factor=fields.number("scaling_factor", 0.18215, 1e6, least=1e-6),
            shift_factor=fields.number("shift_factor", 0.0, 1e6, least=-1e6),
            force_upcast=fields.flag("force_upcast", default=False),
            mid_attention=fields.flag("mid_block_add_attention", default=True),
            attention=_mirrored_levels(down, up, kinds, levels, where),
            codebook_size=fields.whole("num_vq_embeddings", 256, CODES_LIMIT) if is_vq else None,
            codebook_dim=fields.whole("vq_embed_dim", latent_channels, WIDTH_LIMIT),
            quant_conv=is_vq or fields.flag("use_quant_conv", default=True),
        )


def _groups(fields: Fields, channels: tuple[int, ...]) -> int:
    """Groups of every norm, which must part each level's channels evenly."""
    groups = fields.whole("norm_num_groups", 32, GROUPS_LIMIT)
    if any(width % groups for width in channels):
        raise fields.refusal("norm_num_groups", f"a number that divides each of the levels' channels {channels}")
    return groups


def _mirrored_levels(down: Any, up: Any, kinds: Mapping[str, bool], levels: int, where: str) -> tuple[bool, ...]:
    """Which levels have attention, from the highest resolution to the lowest; the way up must be the way down."""
    known = all(
        isinstance(names, list | tuple)
        and len(names) == levels
        and all(isinstance(name, str) and name in kinds for name in names)
        for names in (down, up)
    )
    if not known or [kinds[name] for name in down] != [kinds[name] for name in reversed(up)]:
        raise EngineError(
            f"{where} has down_block_types={shown(down)} and up_block_types={shown(up)}: "
            f"expected {levels} mirrored levels out of {', '.join(kinds)}"
        )
    return tuple(kinds[name] for name in down)
