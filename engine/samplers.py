"""The samplers: pure functions from noise to latents, given a denoiser and the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.denoiser import Denoise
from engine.schedule import NoiseSchedule

DrawNoise = Callable[[], Tensor]
"""Fresh standard-normal noise `(n, c, h, w) float32`, each row from its own sample's generator."""

Sampler = Callable[[Denoise, Tensor, NoiseSchedule, int, Tensor, DrawNoise], Tensor]
"""`(denoise, latents (n, c, h, w) float32, schedule, steps, eta (n, 1, 1, 1) float32, draw_noise)` -> latents."""


def ddim(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, draw_noise: DrawNoise
) -> Tensor:
    """Denoising diffusion implicit models, with noise of strength eta (arXiv:2010.02502, eq. 12 and 16)."""
    stochastic = bool((eta > 0).any())
    clip = schedule.config.clip_sample_range if schedule.config.clip_sample else None
    for timestep, lower in schedule.steps(steps):
        prediction = denoise(latents, timestep)
        data = prediction.data if clip is None else prediction.data.clamp(-clip, clip)
        power, lower_power = schedule.alpha_cumprod(timestep), schedule.alpha_cumprod(lower)
        variance = (1 - lower_power) / (1 - power) * (1 - power / lower_power)
        sigma = eta * math.sqrt(variance)
        direction = (1 - lower_power - sigma**2).clamp(min=0).sqrt()
        latents = math.sqrt(lower_power) * data + direction * prediction.noise
        if stochastic:
            # A row without noise keeps its very bits, whatever its neighbours ask for.
            latents = torch.where(eta > 0, latents + sigma * draw_noise(), latents)
    return latents


def plms(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, _draw_noise: DrawNoise
) -> Tensor:
    """Pseudo linear multistep (arXiv:2202.09778, eq. 12), started by one pseudo improved Euler step as in LDM's code.

    Runs the model once more than there are steps. Deterministic: raises ValueError unless `eta` is 0 in every row.
    """
    if bool((eta != 0).any()):
        raise ValueError("eta must be 0 for PLMS")
    pairs = schedule.steps(steps)
    history: list[Tensor] = []
    for timestep, lower in pairs:
        noise = denoise(latents, timestep).noise
        if not history and len(pairs) > 1:
            ahead = _transfer(schedule, latents, noise, timestep, lower)
            combined = (noise + denoise(ahead, pairs[1][0]).noise) / 2
        elif not history:
            combined = noise
        elif len(history) == 1:
            combined = (3 * noise - history[-1]) / 2
        elif len(history) == 2:
            combined = (23 * noise - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            combined = (55 * noise - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history = [*history[-2:], noise]
        latents = _transfer(schedule, latents, combined, timestep, lower)
    return latents


def _transfer(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timestep: int, lower: int) -> Tensor:
    """Move latents along given noise from one timestep to a lower one (arXiv:2202.09778, eq. 11)."""
    power, lower_power = schedule.alpha_cumprod(timestep), schedule.alpha_cumprod(lower)
    data = (latents - math.sqrt(1 - power) * noise) / math.sqrt(power)
    return math.sqrt(lower_power) * data + math.sqrt(1 - lower_power) * noise


SAMPLER_FUNCTIONS: dict[str, Sampler] = {"ddim": ddim, "plms": plms}
