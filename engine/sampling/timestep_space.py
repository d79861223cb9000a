"""Samplers that visit timesteps of the training, on latents of preserved variance."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from latentmill.engine.sampling.denoiser import Denoise
from latentmill.engine.sampling.schedule import NoiseLevel, NoiseSchedule
from latentmill.engine.sampling.signature import DrawNoise, refuse_eta
from latentmill.engine.sampling.timesteps import distilled_timesteps

_SIGMA_DATA = 0.5
"""Standard deviation of the data that latent consistency models assume."""


def ddim(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, draw_noise: DrawNoise
) -> Tensor:
    """Denoising diffusion implicit models, with noise of strength eta (arXiv:2010.02502, eq. 12 and 16).

    For any model. With eta 1 it is the ancestral sampler of DDPM. First order.
    """
    stochastic = bool((eta > 0).any())
    for timestep, lower_timestep in schedule.steps(steps):
        here, lower = schedule.level(timestep), schedule.level(lower_timestep)
        prediction = denoise(latents, here)
        sigma = eta * math.sqrt((1 - lower.power) / (1 - here.power) * (1 - here.power / lower.power))
        direction = (1 - lower.power - sigma**2).clamp(min=0).sqrt()
        latents = lower.signal * prediction.data + direction * prediction.noise
        if stochastic:
            # A row without noise keeps its very bits, whatever its neighbours ask for.
            latents = torch.where(eta > 0, latents + sigma * draw_noise(), latents)
    return latents


def plms(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, _draw_noise: DrawNoise
) -> Tensor:
    """Pseudo linear multistep (arXiv:2202.09778, eq. 12), started by one pseudo improved Euler step as in LDM's code.

    For any model. Runs the model once more than there are steps; where there is but one, by `original` spacing only, as
    that command's code did and diffusers does not. The history is of predicted noise whatever the model predicts, as
    the paper has it: second order. (diffusers combines velocities, which is of first order only, and refuses models
    that predict data.)
    """
    refuse_eta("PLMS", eta)
    pairs = schedule.steps(steps)
    originals = schedule.config.timestep_spacing == "original"
    history: list[Tensor] = []
    for timestep, lower_timestep in pairs:
        here, lower = schedule.level(timestep), schedule.level(lower_timestep)
        prediction = denoise(latents, here)
        noise = combined = prediction.noise
        if not history and here.power > 0 and (len(pairs) > 1 or originals):
            following = pairs[min(1, len(pairs) - 1)][0]
            ahead = _transfer(latents, noise, here, lower)
            combined = (noise + denoise(ahead, schedule.level(following)).noise) / 2
            if not originals:
                # As in diffusers: one stride that ends at the next timestep, wherever rounding has put that.
                here, lower = schedule.level(following + timestep - lower_timestep), schedule.level(following)
        elif len(history) == 1:
            combined = (3 * noise - history[-1]) / 2
        elif len(history) == 2:
            combined = (23 * noise - 16 * history[-1] + 5 * history[-2]) / 12
        elif len(history) == 3:
            combined = (55 * noise - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history = [*history[-2:], noise]
        if here.power > 0:
            latents = _transfer(latents, combined, here, lower)
        else:
            # Where there is no signal at all, the noise says nothing of the data: start with DDIM's step.
            latents = lower.signal * prediction.data + lower.noise * noise
    return latents


def _transfer(latents: Tensor, noise: Tensor, here: NoiseLevel, lower: NoiseLevel) -> Tensor:
    """Move latents along given noise from one level to a lower one (arXiv:2202.09778, eq. 11)."""
    data = (latents - here.noise * noise) / here.signal
    return lower.signal * data + lower.noise * noise


def lcm(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, draw_noise: DrawNoise
) -> Tensor:
    """Multistep latent consistency sampling (arXiv:2310.04378, algorithm 3; scalings: arXiv:2303.01469, appendix C).

    Only for models distilled for it (LCM, or with LCM-LoRA merged), at 1 to 8 steps and little or no guidance: at every
    step the whole way to the data is gone, and noise is put back. Of any other model the pictures are blurred.
    """
    refuse_eta("LCM", eta)
    levels = [schedule.level(int(timestep)) for timestep in distilled_timesteps(schedule.config, steps)]
    data = _consistent(denoise, latents, levels[0], schedule)
    for _, lower in pairwise(levels):
        latents = lower.signal * data + lower.noise * draw_noise()
        data = _consistent(denoise, latents, lower, schedule)
    return data


def _consistent(denoise: Denoise, latents: Tensor, level: NoiseLevel, schedule: NoiseSchedule) -> Tensor:
    """The consistency function: the data, but the latents themselves as the timestep goes to 0."""
    scaled = level.timestep * schedule.config.timestep_scaling
    radius = math.hypot(scaled, _SIGMA_DATA)
    return scaled / radius * denoise(latents, level).data + (_SIGMA_DATA / radius) ** 2 * latents
