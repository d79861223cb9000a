"""One point of the forward process: how much signal and how much noise there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_ALPHA_BAR = 2.0**-24
"""What stands for an alpha_bar of 0 (a schedule rescaled to zero terminal SNR) where one must divide by it."""


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """One point of the forward process: latents there are `signal * x0 + noise * (standard-normal noise)`.

    `timestep` is what the network is told; it may lie between two timesteps of the training.
    """

    timestep: float
    signal: float
    noise: float

    @classmethod
    def from_alpha_bar(cls, timestep: float, alpha_bar: float) -> NoiseLevel:
        """The level of a variance-preserving process whose cumulative product of 1 - beta is `alpha_bar`."""
        return cls(timestep, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @classmethod
    def from_sigma(cls, timestep: float, sigma: float) -> NoiseLevel:
        """The same, by noise over signal."""
        return cls.from_alpha_bar(timestep, 1 / (1 + sigma**2))

    @classmethod
    def from_flow(cls, timestep: float, noise: float) -> NoiseLevel:
        """The level of flow matching (arXiv:2403.03206, eq. 13): a place on the straight line from x0 to noise."""
        return cls(timestep, 1 - noise, noise)

    @property
    def sigma(self) -> float:
        """Noise over signal: the standard deviation of the noise where x0 keeps its scale (arXiv:2206.00364)."""
        return self.noise / self.signal
