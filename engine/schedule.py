"""The forward process: how much signal is left at each timestep, and which timesteps a sampler visits."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import SchedulerConfig
from engine.types import EngineError


class NoiseSchedule:
    """`alphas_cumprod (T,) float32`: the paper's cumulative product of 1 - beta (arXiv:2006.11239, section 2)."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        self._final = 1.0 if config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def alpha_cumprod(self, timestep: int) -> float:
        """Signal power at `timestep`; below 0 lies the data itself."""
        return float(self.alphas_cumprod[timestep]) if timestep >= 0 else self._final

    def add_noise(self, data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process in closed form (arXiv:2006.11239, eq. 4), for `timesteps (n,)`."""
        signal = self.alphas_cumprod.to(data.device)[timesteps].reshape(-1, *[1] * (data.ndim - 1))
        return signal.sqrt() * data + (1 - signal).sqrt() * noise

    def steps(self, num_inference_steps: int) -> list[tuple[int, int]]:
        """Pairs (timestep, next lower timestep), descending; the last pair ends below or at 0.

        The spacings are those of arXiv:2305.08891, table 2, rounded as diffusers rounds them; the stride to the lower
        timestep is T // S, as there. Raises EngineError where a timestep falls outside the schedule.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise EngineError(f"num_inference_steps is {num_inference_steps}; this model takes 1 to {total}")
        stride = total // num_inference_steps
        spacing = self.config.timestep_spacing
        if spacing == "leading":
            timesteps: NDArray[np.float64] = (
                np.arange(num_inference_steps, dtype=np.float64)[::-1] * stride + self.config.steps_offset
            )
        elif spacing == "trailing":
            timesteps = np.round(np.arange(total, 0, -total / num_inference_steps))[:num_inference_steps] - 1
        else:
            timesteps = np.round(np.linspace(0, total - 1, num_inference_steps))[::-1]
        if timesteps[0] >= total:
            raise EngineError(
                f"num_inference_steps is {num_inference_steps}, which starts at timestep {int(timesteps[0])} "
                f"of {total} with an offset of {self.config.steps_offset}; take {num_inference_steps - 1} or fewer"
            )
        return [(int(timestep), int(timestep) - stride) for timestep in timesteps]


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
