"""A sampler by its name: the table's entry put to work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentmill.engine.sampling import solvers
from latentmill.engine.sampling.levels import place_levels
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.solvers import DrawNoise, Solver
from latentmill.engine.sampling.start import Start, keep_outside, last_steps, noised
from latentmill.engine.sampling.table import SAMPLER_TABLE


def begin(
    sampler: str,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    draw_noise: DrawNoise,
    etas: Sequence[float],
    start: Start | None = None,
) -> Solver:
    """The way from noise `(n, c, h, w) float32` to latents. `etas`, one for each row, count where they are taken.

    With a `start`, the noise is put on what the rows start from.
    """
    entry = SAMPLER_TABLE[sampler]
    levels = place_levels(sampler, schedule, num_inference_steps, noise.shape[-2] * noise.shape[-1])
    name = entry.solver if schedule.config.flow is None or entry.flow is None else entry.flow[0]
    latents = noise
    if start is not None:
        latents, levels = noised(start, noise, levels), last_steps(levels, start.steps)
    options: dict[str, Any] = {}
    if entry.takes_eta and any(etas):
        # Filled in where the noise is: a column of the host's would have to be copied there.
        options["eta"] = torch.cat([torch.full((1, 1, 1, 1), eta, device=noise.device) for eta in etas])
    draws = entry.stochastic or bool(options)
    solver: Solver = getattr(solvers, name)(latents, levels, draw_noise if draws else None, **options)
    return solver if start is None or start.mask is None else keep_outside(solver, start, start.mask, noise)
