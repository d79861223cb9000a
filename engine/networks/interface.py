"""What latent diffusion asks of a family's two networks, whichever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from latentmill.engine.loading.interface import AutoencoderConfig


class DenoisingNetwork(Protocol):
    """Predicts noise, velocity or x0 from noisy latents.

    `latents (n, c, h, w)`, `timesteps (n,)`, `context (n, l, d)` -> `(n, c, h, w)`, all in the network's dtype.
    `conditions` are what the family's `conditions` gives: pooled text and the like.
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor, **conditions: Tensor) -> Tensor:
        """The raw prediction."""


@runtime_checkable
class ProjectsContext(Protocol):
    """A denoiser that takes what follows from the context alone as `projected`, made once for all steps."""

    def project(self, context: Tensor) -> Any:
        """Keys and values of the context, `(n, l, d)`, for every layer that attends to it."""


class Autoencoder(nn.Module, ABC):
    """Between pixels and latents."""

    config: AutoencoderConfig

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels `(n, 3, h, w)` in [-1, 1] -> latents, unscaled: their mean, and their spread if they are drawn."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents, unscaled, `(n, c, h / f, w / f)` -> pixels `(n, 3, h, w)`, about [-1, 1]; each row on its own."""
