"""A model's architecture as one value: whether it comes from a folder or from a single file."""

from __future__ import annotations

from dataclasses import dataclass

from latentmill.engine.families.family import Family, TextEncoderSpec
from latentmill.engine.loading.config import SchedulerConfig, UNetConfig, VAEConfig
from latentmill.engine.types import EngineError


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All that is needed to build the networks, before any weight is read."""

    family: Family
    unet: UNetConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    encoders: tuple[TextEncoderSpec, ...]
    force_zeros_for_empty_prompt: bool = False

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt that every text encoder takes, start and end marks included."""
        return min(encoder.max_tokens for encoder in self.encoders)

    @property
    def components(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return ("unet", self.family.vae_component, *(encoder.component for encoder in self.encoders))


def check_fit(blueprint: Blueprint, where: object) -> None:
    """Refuse parts that do not fit together before gigabytes are read. Raises EngineError."""
    unet, vae = blueprint.unet, blueprint.vae
    if unet.in_channels != vae.unet_channels or unet.out_channels != vae.unet_channels:
        raise EngineError(
            f"{where}: the U-Net takes {unet.in_channels} latent channels and gives {unet.out_channels}, "
            f"the autoencoder has {vae.unet_channels}: these parts are not of one text-to-image model"
        )
    width = sum(encoder.width for encoder in blueprint.encoders)
    if width != unet.context_dim:
        raise EngineError(
            f"{where}: the text encoder is {width} wide, the U-Net's cross-attention expects "
            f"{unet.context_dim}: these parts are not of one model"
        )
    if unet.addition_time_embed_dim is not None:
        found = sum(encoder.pooled_width for encoder in blueprint.encoders) + 6 * unet.addition_time_embed_dim
        if found != unet.projection_input_dim:
            raise EngineError(
                f"{where}: pooled text and size make {found} features, the U-Net's added embedding expects "
                f"{unet.projection_input_dim}: these parts are not of one model"
            )
