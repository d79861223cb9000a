"""The forward process: how much signal is left at each timestep."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.sampling.noise_level import LEAST_ALPHA_BAR, NoiseLevel
from latentmill.engine.types import EngineError


class NoiseSchedule:
    """The folder's schedule. `patch_size` counts cells along a side of what the network sees as one token."""

    def __init__(self, config: SchedulerConfig, patch_size: int = 1) -> None:
        self.config = config
        self.patch_size = patch_size

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """`(T,) float32`: the paper's cumulative product of 1 - beta (arXiv:2006.11239, section 2).

        Raises EngineError for flow matching, which has no betas.
        """
        if self.config.flow is not None:
            raise EngineError("the model is of flow matching: its schedule has no betas")
        return torch.cumprod(1.0 - _betas(self.config), dim=0)

    def level(self, timestep: int) -> NoiseLevel:
        """The level at a timestep of the training; below 0, what the folder takes for x0 itself."""
        final = 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])
        alpha_bar = float(self.alphas_cumprod[timestep]) if timestep >= 0 else final
        return NoiseLevel.from_alpha_bar(timestep, alpha_bar)

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """`(T,)` ascending: noise over signal at each timestep, finite everywhere."""
        alpha_bar = np.maximum(self.alphas_cumprod.numpy().astype(np.float64), LEAST_ALPHA_BAR)
        return np.sqrt((1 - alpha_bar) / alpha_bar)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process in closed form (arXiv:2006.11239, eq. 4), for `timesteps (n,)`."""
        alpha_bar = self.alphas_cumprod.to(x0.device)[timesteps].reshape(-1, *[1] * (x0.ndim - 1))
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


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
    """alpha_bar at time `t` in [0, 1] of the cosine schedule (arXiv:2102.09672, eq. 17)."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale the signal so that none is left at the last timestep (arXiv:2305.08891, algorithm 1)."""
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alpha_bar = ((signal - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
