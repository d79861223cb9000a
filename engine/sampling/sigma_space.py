"""Samplers that step from one noise level to the next where the data keeps its scale: x = data + sigma * noise.

The denoiser is given latents of preserved variance, x / sqrt(1 + sigma^2), as everywhere in the engine.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from torch import Tensor

from latentmill.engine.sampling.denoiser import Denoise
from latentmill.engine.sampling.schedule import LEAST_POWER, NoiseLevel, NoiseSchedule
from latentmill.engine.sampling.signature import DrawNoise, refuse_eta
from latentmill.engine.sampling.timesteps import Timesteps, check_range, continuous_timesteps, solver_timesteps

_CLEAN = NoiseLevel(0, 1.0)
_KARRAS_RHO = 7.0
_FEW_STEPS = 15
"""Below this many steps the solver's last one is of first order, for stability, as in its authors' code."""


def euler(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, _draw_noise: DrawNoise
) -> Tensor:
    """Euler's method on the probability-flow ODE in sigma (arXiv:2206.00364, algorithm 1 without its second half).

    For any model; with trailing timesteps and 1 to 4 steps for those distilled adversarially. First order.
    """
    refuse_eta("euler", eta)
    levels = _spaced_levels(schedule, steps)
    x = _start(latents, schedule, levels[0])
    for here, lower in pairwise(levels):
        data = denoise(x * here.signal, here).data
        x = data + lower.sigma / here.sigma * (x - data)
    return x


def euler_a(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, draw_noise: DrawNoise
) -> Tensor:
    """Ancestral sampling: an Euler step below the next level, and noise back up to it (arXiv:2006.11239, eq. 7).

    For any model; with trailing timesteps and 1 to 4 steps for those distilled adversarially. Its noise is that of
    DDIM's eta 1, and not a parameter.
    """
    refuse_eta("euler_a", eta)
    levels = _spaced_levels(schedule, steps)
    x = _start(latents, schedule, levels[0])
    for here, lower in pairwise(levels):
        data = denoise(x * here.signal, here).data
        ratio = lower.sigma / here.sigma
        x = data + ratio**2 * (x - data)
        if lower.sigma > 0:
            x = x + lower.sigma * math.sqrt(1 - ratio**2) * draw_noise()
    return x


def heun(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, _draw_noise: DrawNoise
) -> Tensor:
    """Heun's method on the probability-flow ODE in sigma (arXiv:2206.00364, algorithm 1). Second order.

    For any model. Runs the model twice a step, but once in the last.
    """
    refuse_eta("heun", eta)
    levels = _spaced_levels(schedule, steps)
    x = _start(latents, schedule, levels[0])
    for here, lower in pairwise(levels):
        slope = (x - denoise(x * here.signal, here).data) / here.sigma
        length = lower.sigma - here.sigma
        if lower.sigma > 0:
            ahead = x + length * slope
            slope = (slope + (ahead - denoise(ahead * lower.signal, lower).data) / lower.sigma) / 2
        x = x + length * slope
    return x


def dpmpp_2m(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, _draw_noise: DrawNoise
) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): second order at one run of the model a step. For any model.

    By `original` spacing it is the solver of the original command's `--dpm_solver`: uniform in time, down to the lowest
    noise level of the training instead of to none.
    """
    refuse_eta("dpmpp_2m", eta)
    return _solve(denoise, latents, _solver_levels(schedule, steps), None)


def dpmpp_2m_karras(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, _draw_noise: DrawNoise
) -> Tensor:
    """DPM-Solver++(2M) over the noise levels of arXiv:2206.00364, eq. 5. For any model; no timestep spacing applies."""
    refuse_eta("dpmpp_2m_karras", eta)
    return _solve(denoise, latents, _karras_levels(schedule, steps), None)


def dpmpp_2m_sde(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, draw_noise: DrawNoise
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, section 5): the reverse diffusion itself. For any model."""
    refuse_eta("dpmpp_2m_sde", eta)
    return _solve(denoise, latents, _solver_levels(schedule, steps), draw_noise)


def dpmpp_2m_sde_karras(
    denoise: Denoise, latents: Tensor, schedule: NoiseSchedule, steps: int, eta: Tensor, draw_noise: DrawNoise
) -> Tensor:
    """SDE-DPM-Solver++(2M) over the noise levels of arXiv:2206.00364, eq. 5. For any model; no spacing applies."""
    refuse_eta("dpmpp_2m_sde_karras", eta)
    return _solve(denoise, latents, _karras_levels(schedule, steps), draw_noise)


def _solve(denoise: Denoise, latents: Tensor, levels: list[NoiseLevel], draw_noise: DrawNoise | None) -> Tensor:
    """The multistep loop, written in sigma: lambda of the paper is -log sigma. With `draw_noise`, the SDE's."""
    steps = len(levels) - 1
    x = latents / levels[0].signal
    earlier: tuple[Tensor, float] | None = None
    for number, (here, lower) in enumerate(pairwise(levels), start=1):
        data = denoise(x * here.signal, here).data
        target = data
        ratio = lower.sigma / here.sigma
        if lower.sigma > 0:
            step = -math.log(ratio)
            if earlier is not None and not (number == steps < _FEW_STEPS):
                earlier_data, earlier_step = earlier
                target = data + step / (2 * earlier_step) * (data - earlier_data)
            earlier = (data, step)
        if draw_noise is None:
            x = target + ratio * (x - target)
        else:
            x = target + ratio**2 * (x - target)
            if lower.sigma > 0:
                x = x + lower.sigma * math.sqrt(1 - ratio**2) * draw_noise()
    return x * levels[-1].signal


def _start(latents: Tensor, schedule: NoiseSchedule, first: NoiseLevel) -> Tensor:
    """Latents at the first level, as in diffusers.

    Noise of its sigma where the spacing begins at the last timestep; latents of variance 1 where it stops short of it.
    """
    from_the_top = schedule.config.timestep_spacing in {"trailing", "linspace"}
    return latents * first.sigma if from_the_top else latents / first.signal


def _spaced_levels(schedule: NoiseSchedule, steps: int) -> list[NoiseLevel]:
    return [*_levels_at(schedule, continuous_timesteps(schedule.config, steps)), _CLEAN]


def _solver_levels(schedule: NoiseSchedule, steps: int) -> list[NoiseLevel]:
    timesteps = solver_timesteps(schedule.config, steps)
    if schedule.config.timestep_spacing != "original":
        return [*_levels_at(schedule, timesteps), _CLEAN]
    log_power = np.log(np.maximum(schedule.alphas_cumprod.numpy().astype(np.float64), LEAST_POWER))
    timesteps = np.append(timesteps, 0)
    powers = np.exp(np.interp(timesteps, np.arange(len(log_power)), log_power))
    return [NoiseLevel(*pair) for pair in zip(timesteps.tolist(), powers.tolist(), strict=True)]


def _levels_at(schedule: NoiseSchedule, timesteps: Timesteps) -> list[NoiseLevel]:
    """Between timesteps of the training, sigma is interpolated on a line, as in diffusers."""
    sigmas = np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas)
    return [NoiseLevel.from_sigma(*pair) for pair in zip(timesteps.tolist(), sigmas.tolist(), strict=True)]


def _karras_levels(schedule: NoiseSchedule, steps: int) -> list[NoiseLevel]:
    """From the highest sigma of the training to the lowest, evenly in their seventh root; then none.

    The network is told the nearest timestep by the logarithm of sigma, a whole number as in diffusers.
    """
    check_range(schedule.config, steps)
    known = schedule.sigmas
    roots = np.linspace(known[-1] ** (1 / _KARRAS_RHO), known[0] ** (1 / _KARRAS_RHO), steps)
    sigmas = roots**_KARRAS_RHO
    timesteps = np.round(np.interp(np.log(sigmas), np.log(known), np.arange(len(known))))
    levels = [NoiseLevel.from_sigma(*pair) for pair in zip(timesteps.tolist(), sigmas.tolist(), strict=True)]
    return [*levels, _CLEAN]
