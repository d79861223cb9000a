"""A sampler by its name: the table's entry put to work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from latentmill.engine.sampling import solvers
from latentmill.engine.sampling.denoiser import Denoise
from latentmill.engine.sampling.levels import PLACEMENTS
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.solvers import DrawNoise
from latentmill.engine.sampling.table import SAMPLER_TABLE


def sample(
    sampler: str,
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    draw_noise: DrawNoise,
    eta: Tensor,
) -> Tensor:
    """Noise `(n, c, h, w) float32` -> latents. `eta (n, 1, 1, 1) float32` counts only for samplers that take it."""
    entry = SAMPLER_TABLE[sampler]
    solve = getattr(solvers, entry.solver)
    levels = PLACEMENTS[entry.levels].place(schedule, num_inference_steps)
    options: dict[str, Any] = {"eta": eta} if entry.takes_eta else {}
    latents: Tensor = solve(denoise, noise, levels, draw_noise if entry.draws_noise else None, **options)
    return latents
