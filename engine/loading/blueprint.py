"""A model's architecture as one value: the same for a folder, a single file, and any family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from latentmill.engine.loading.config import Json, SchedulerConfig, UNetConfig, VAEConfig
from latentmill.engine.types import EngineError

TowerKind = Literal["clip", "clip-projection", "ldm-bert"]
Family = Literal["stable-diffusion", "stable-diffusion-xl", "latent-diffusion"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """One text encoder.

    `config` is its `config.json`. `penultimate` takes the states before the last layer and without the final norm.
    `pad_id` overrides the tokenizer's own padding: OpenCLIP pads with 0.
    """

    kind: TowerKind
    config: Json
    component: str
    tokenizer: str
    penultimate: bool = False
    pad_id: int | None = None

    @property
    def width(self) -> int:
        """Features of one token's state."""
        return int(self.config["d_model" if self.kind == "ldm-bert" else "hidden_size"])

    @property
    def pooled_width(self) -> int:
        """Features of the prompt's pooled embedding; 0 where there is none."""
        return int(self.config["projection_dim"]) if self.kind == "clip-projection" else 0

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt, start and end marks included."""
        return int(self.config.get("max_position_embeddings", 77))


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All that is needed to build the networks, before any weight is read. `vae_component` names the first stage."""

    family: Family
    unet: UNetConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    towers: tuple[Tower, ...]
    vae_component: str = "vae"
    force_zeros_for_empty_prompt: bool = False

    @property
    def max_tokens(self) -> int:
        """Tokens per prompt that every text encoder takes, start and end marks included."""
        return min(tower.max_tokens for tower in self.towers)

    @property
    def components(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return ("unet", self.vae_component, *(tower.component for tower in self.towers))


_FIELDS: Mapping[str, tuple[str, ...]] = {
    "clip": ("hidden_size",),
    "clip-projection": ("hidden_size", "projection_dim"),
    "ldm-bert": ("d_model",),
}


def check_fit(blueprint: Blueprint, where: object) -> None:
    """Refuse parts that do not fit together before gigabytes are read. Raises EngineError."""
    unet, vae = blueprint.unet, blueprint.vae
    if unet.in_channels != vae.unet_channels or unet.out_channels != vae.unet_channels:
        raise EngineError(
            f"{where}: the U-Net takes {unet.in_channels} latent channels and gives {unet.out_channels}, "
            f"the autoencoder has {vae.unet_channels}: these parts are not of one text-to-image model"
        )
    for tower in blueprint.towers:
        for field in _FIELDS[tower.kind]:
            if not isinstance(tower.config.get(field), int):
                raise EngineError(f"{where}: {tower.component}/config.json has no whole number {field}")
    width = sum(tower.width for tower in blueprint.towers)
    if width != unet.context_dim:
        raise EngineError(
            f"{where}: the text encoder is {width} wide, the U-Net's cross-attention expects "
            f"{unet.context_dim}: these parts are not of one model"
        )
    if unet.addition_time_embed_dim is not None:
        found = sum(tower.pooled_width for tower in blueprint.towers) + 6 * unet.addition_time_embed_dim
        if found != unet.projection_input_dim:
            raise EngineError(
                f"{where}: pooled text and size make {found} features, the U-Net's added embedding expects "
                f"{unet.projection_input_dim}: these parts are not of one model"
            )
