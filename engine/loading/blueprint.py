"""A model's architecture as one value: whether it comes from a folder or from a single file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentmill.engine.families.family import Family, TextEncoderSpec
from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.loading.interface import AutoencoderConfig, DenoiserConfig
from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All that is needed to build the networks, before any weight is read.

    `empty_tokens` counts the tokens of an encoder that was left out: zeros stand for them. The last two begin the keys
    of a single file.
    """

    family: Family
    denoiser: DenoiserConfig
    autoencoder: AutoencoderConfig
    scheduler: SchedulerConfig
    encoders: tuple[TextEncoderSpec, ...]
    force_zeros_for_empty_prompt: bool = False
    empty_tokens: int = 0
    denoiser_prefix: str = ""
    autoencoder_prefix: str = ""

    @property
    def reader(self) -> int:
        """Which of the text encoders takes most of a prompt: its tokens are the ones that are counted."""
        taken = [encoder.max_tokens - encoder.marks for encoder in self.encoders]
        return taken.index(max(taken))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt that are read, by the encoder that takes most of them."""
        encoder = self.encoders[self.reader]
        return encoder.max_tokens - encoder.marks

    @property
    def max_tokens(self) -> int:
        """As `prompt_tokens`, and a start and an end mark."""
        return self.prompt_tokens + 2

    @property
    def factor(self) -> int:
        """Pixels along a side that every size must be a multiple of."""
        return self.autoencoder.factor * self.denoiser.patch_size

    @property
    def context_width(self) -> int:
        """Features of one token: those of encoders side by side, or of the widest where they follow one another."""
        widths = [0]
        for encoder in self.encoders:
            if encoder.follows:
                widths.append(0)
            widths[-1] += encoder.width
        return max(widths)

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
    width = blueprint.context_width
    # An encoder that was left out may have been the widest.
    if width > denoiser.context_dim or (width < denoiser.context_dim and not blueprint.empty_tokens):
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
