"""The samplers: pure functions from noise to latents, given a denoiser and the schedule.

Guidance and what the model predicts are the denoiser's business; a sampler sees noise and data, as predicted.
"""

from __future__ import annotations

from latentmill.engine.sampling.sigma_space import (
    dpmpp_2m,
    dpmpp_2m_karras,
    dpmpp_2m_sde,
    dpmpp_2m_sde_karras,
    euler,
    euler_a,
    heun,
)
from latentmill.engine.sampling.signature import DrawNoise, Sampler
from latentmill.engine.sampling.timestep_space import ddim, lcm, plms

SAMPLER_FUNCTIONS: dict[str, Sampler] = {
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": dpmpp_2m_karras,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_karras": dpmpp_2m_sde_karras,
    "lcm": lcm,
}

__all__ = [
    "SAMPLER_FUNCTIONS",
    "DrawNoise",
    "Sampler",
    "ddim",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "euler",
    "euler_a",
    "heun",
    "lcm",
    "plms",
]
