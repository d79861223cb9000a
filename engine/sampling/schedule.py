"""The forward process: how much signal is left at each timestep, and which timesteps a sampler visits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentmill.engine.loading.config import SchedulerConfig
from latentmill.engine.sampling.timesteps import whole_timesteps

LEAST_POWER = 2.0**-24
"""What stands for a signal power of 0 (a schedule rescaled to zero terminal SNR) where one must divide by it."""


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """One point of the forward process: the timestep that the network is told, and the signal power in the latents.

    Latents at a level are `signal * data + noise * (standard-normal noise)`: their variance is preserved. The timestep
    may lie between those of the training.
    """

    timestep: float
    power: float

    @classmethod
    def from_sigma(cls, timestep: float, sigma: float) -> NoiseLevel:
        return cls(timestep, 1 / (1 + sigma**2))

    @property
    def signal(self) -> float:
        return math.sqrt(self.power)

    @property
    def noise(self) -> float:
        return math.sqrt(1 - self.power)

    @property
    def sigma(self) -> float:
        """Noise over signal: the standard deviation of the noise where the data keeps its scale (arXiv:2206.00364)."""
        return math.sqrt((1 - self.power) / self.power)


class NoiseSchedule:
    """`alphas_cumprod (T,) float32`: the paper's cumulative product of 1 - beta (arXiv:2006.11239, section 2)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        self._final = 1.0 if config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def level(self, timestep: int) -> NoiseLevel:
        """The level at a timestep of the training; below 0 lies what the folder takes for the data itself."""
        return NoiseLevel(timestep, float(self.alphas_cumprod[timestep]) if timestep >= 0 else self._final)

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """`(T,)` ascending: noise over signal at each timestep, finite everywhere."""
        power = np.maximum(self.alphas_cumprod.numpy().astype(np.float64), LEAST_POWER)
        return np.sqrt((1 - power) / power)

    def add_noise(self, data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process in closed form (arXiv:2006.11239, eq. 4), for `timesteps (n,)`."""
        signal = self.alphas_cumprod.to(data.device)[timesteps].reshape(-1, *[1] * (data.ndim - 1))
        return signal.sqrt() * data + (1 - signal).sqrt() * noise

    def steps(self, num_inference_steps: int) -> list[tuple[int, int]]:
        """Pairs (timestep, next lower timestep), descending, for samplers that visit timesteps of the training.

        As in diffusers, the stride to the lower timestep is T // S: where that does not divide (trailing, linspace), a
        step ends a little above the next timestep. By `original` spacing a step ends at the next timestep, the last one
        at 0. Raises EngineError that names the nearest number that works.
        """
        timesteps = [int(timestep) for timestep in whole_timesteps(self.config, num_inference_steps)]
        if self.config.timestep_spacing == "original":
            return list(pairwise([*timesteps, 0]))
        stride = self.config.num_train_timesteps // num_inference_steps
        return [(timestep, timestep - stride) for timestep in timesteps]


def _betas(config: SchedulerConfig) -> Tensor:
    """`(T,) float32` noise variances of the config's schedule."""
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, total, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        # The latent diffusion authors' "linear": linear in the square root.
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, total, dtype=torch.float32) ** 2
    else:
        betas = torch.tensor(
            [min(1 - _cosine((i + 1) / total) / _cosine(i / total), 0.999) for i in range(total)], dtype=torch.float32
        )
    return _zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def _cosine(t: float) -> float:
    """Signal power at time `t` in [0, 1] of the cosine schedule (arXiv:2102.09672, eq. 17)."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale the signal so that none is left at the last timestep (arXiv:2305.08891, algorithm 1)."""
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    power = ((signal - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([power[:1], power[1:] / power[:-1]])
