"""The config of a tiny decoder, as diffusers' AutoencoderTiny has it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from latentmill.engine.loading.config import LAYERS_LIMIT, LEVELS_LIMIT, WIDTH_LIMIT, Json
from latentmill.engine.loading.fields import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyDecoderConfig:
    """Its width, which is the same on all levels, and its blocks, from the lowest resolution to the highest."""

    latent_channels: int
    channels: int
    blocks: tuple[int, ...]
    scaling_factor: float
    shift_factor: float
    force_upcast: bool

    @property
    def denoiser_channels(self) -> int:
        """Channels of the latents that the denoiser works on."""
        return self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self.blocks) - 1))

    @property
    def decoder_width(self) -> int:
        """Features per pixel of the largest activation while decoding."""
        return self.channels

    @classmethod
    def from_dict(cls, config: Json, where: str) -> TinyDecoderConfig:
        """Parse diffusers' `AutoencoderTiny` config. Raises EngineError for a switch that is not supported."""
        fields = Fields(config, where)
        usual = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "out_channels": 3}
        for name, value in usual.items():
            if config.get(name, value) != value:
                raise fields.refusal(name, repr(value))
        blocks = fields.wholes("num_decoder_blocks", (3, 3, 3, 1), LAYERS_LIMIT, length=LEVELS_LIMIT)
        channels = fields.wholes("decoder_block_out_channels", (64,) * 4, WIDTH_LIMIT, length=LEVELS_LIMIT)
        if len(channels) != len(blocks) or len(set(channels)) > 1:
            raise fields.refusal("decoder_block_out_channels", f"one width for all {len(blocks)} levels")
        return cls(
            latent_channels=fields.whole("latent_channels", 4, WIDTH_LIMIT),
            channels=channels[0],
            blocks=blocks,
            scaling_factor=fields.number("scaling_factor", 1.0, 1e6, least=1e-6),
            shift_factor=fields.number("shift_factor", 0.0, 1e6, least=-1e6),
            force_upcast=fields.flag("force_upcast", default=False),
        )
