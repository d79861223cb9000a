"""A sampler by its name: the table's entry put to work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from latentmill.engine.sampling import solvers
from latentmill.engine.sampling.levels import PLACEMENTS
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.solvers import DrawNoise, Solver
from latentmill.engine.sampling.table import SAMPLER_TABLE


def begin(
    sampler: str, noise: Tensor, schedule: NoiseSchedule, num_inference_steps: int, draw_noise: DrawNoise, eta: Tensor
) -> Solver:
    """The way from noise `(n, c, h, w) float32` to latents. `eta (n, 1, 1, 1) float32` counts where it is taken."""
    entry = SAMPLER_TABLE[sampler]
    levels = PLACEMENTS[entry.levels].place(schedule, num_inference_steps)
    options: dict[str, Any] = {"eta": eta} if entry.takes_eta else {}
    solver: Solver = getattr(solvers, entry.solver)(noise, levels, draw_noise if entry.draws_noise else None, **options)
    return solver
