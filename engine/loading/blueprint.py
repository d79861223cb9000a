"""A model's architecture as one value: whether it comes from a folder or from a single file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentmill.engine.families.family import Family, TextEncoderSpec
from latentmill.engine.loading.config import SchedulerConfig, UNetConfig, VAEConfig
from latentmill.engine.loading.interface import AutoencoderConfig, DenoiserConfig
from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All that is needed to build the networks, before any weight is read."""

    family: Family
    denoiser: DenoiserConfig
    autoencoder: AutoencoderConfig
    scheduler: SchedulerConfig
    encoders: tuple[TextEncoderSpec, ...]
    force_zeros_for_empty_prompt: bool = False

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt that every text encoder takes, start and end marks included."""
        return min(encoder.max_tokens for encoder in self.encoders)

    @property
    def builders(self) -> dict[str, Callable[[], nn.Module]]:
        """Each part that has weights, and how it is built without them."""
        denoiser, autoencoder = self.family.denoiser, self.family.autoencoder
        return {
            denoiser.component: lambda: denoiser.build(self.denoiser),
            autoencoder.component: lambda: autoencoder.build(self.autoencoder),
            **{encoder.component: encoder.build for encoder in self.encoders},
        }

    @property
    def components(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return tuple(self.builders)

    @property
    def unet(self) -> UNetConfig:
        """The denoiser's config, if it is latent diffusion's U-Net. Raises EngineError for another."""
        if not isinstance(self.denoiser, UNetConfig):
            raise EngineError(f"{self.family.name} has no U-Net of latent diffusion")
        return self.denoiser

    @property
    def vae(self) -> VAEConfig:
        """The autoencoder's config, if it is latent diffusion's. Raises EngineError for another."""
        if not isinstance(self.autoencoder, VAEConfig):
            raise EngineError(f"{self.family.name} has no autoencoder of latent diffusion")
        return self.autoencoder


def check_fit(blueprint: Blueprint, where: object) -> None:
    """Refuse parts that do not fit together before gigabytes are read. Raises EngineError."""
    denoiser, latent_channels = blueprint.denoiser, blueprint.autoencoder.denoiser_channels
    if denoiser.in_channels == 2 * latent_channels + 1:
        raise EngineError(
            f"{where}: the denoiser is an inpainting U-Net, which takes {denoiser.in_channels} channels and not "
            f"{latent_channels}; such models are not run: use the text-to-image model, which inpaints as well"
        )
    if denoiser.in_channels != latent_channels or denoiser.out_channels != latent_channels:
        raise EngineError(
            f"{where}: the denoiser takes {denoiser.in_channels} latent channels and gives {denoiser.out_channels}, "
            f"the autoencoder has {latent_channels}: these parts are not of one text-to-image model"
        )
    width = sum(encoder.width for encoder in blueprint.encoders)
    if width != denoiser.context_dim:
        raise EngineError(
            f"{where}: the text encoder is {width} wide, the denoiser's attention expects {denoiser.context_dim}: "
            "these parts are not of one model"
        )
    pooled = sum(encoder.pooled_width for encoder in blueprint.encoders)
    if denoiser.pooled_dim is not None and pooled != denoiser.pooled_dim:
        raise EngineError(
            f"{where}: the pooled text has {pooled} features, the denoiser expects {denoiser.pooled_dim}: these parts "
            "are not of one model"
        )
