"""Rows that start from a picture: noised latents in place of noise, fewer steps, and a part that stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentmill.engine.sampling.denoiser import Prediction
from latentmill.engine.sampling.levels import Levels
from latentmill.engine.sampling.noise_level import NoiseLevel
from latentmill.engine.sampling.solvers import Solver


@dataclass(frozen=True, slots=True)
class Start:
    """What rows of one loop start from: `x0 (n, c, h, w) float32`, and how many of the last steps they take.

    `mask (n, 1, h, w) bool` is True where a row is drawn anew, or None if all of all rows is.
    """

    x0: Tensor
    steps: int
    mask: Tensor | None = None


def last_steps(levels: Levels, steps: int) -> Levels:
    """The last so many steps, from latents at the first one's level. Of fewer than all, none is made twice."""
    correction = levels.correction if steps >= len(levels.steps) else None
    return replace(levels, steps=levels.steps[-steps:], starts_as_noise=False, correction=correction)


def noised(start: Start, noise: Tensor, levels: Levels) -> Tensor:
    """The latents at the level of the first step that is taken (arXiv:2108.01073, eq. 4).

    As in diffusers, what is drawn anew by all steps behind a mask starts from noise alone.
    """
    here = levels.steps[-start.steps :][0].here
    latents = here.signal * start.x0 + here.noise * noise
    if start.mask is None or start.steps < len(levels.steps):
        return latents
    alone = noise * (here.noise if levels.starts_as_noise else 1.0)
    whole = start.mask.flatten(1).all(1).reshape(-1, 1, 1, 1)
    return torch.where(whole, latents, alone)


def keep_outside(solver: Solver, start: Start, mask: Tensor, noise: Tensor) -> Solver:
    """The solver, with x0 under the given noise outside the mask at every level (arXiv:2201.09865, section 4.1).

    The network sees it there, so that what is drawn fits to it. The solver's own latents do not matter there.
    """

    def kept(latents: Tensor, level: NoiseLevel) -> tuple[Tensor, NoiseLevel]:
        return torch.where(mask, latents, level.signal * start.x0 + level.noise * noise), level

    # The first latents are as `noised` has them.
    asked = next(solver)
    while True:
        prediction: Prediction = yield asked
        try:
            asked = kept(*solver.send(prediction))
        except StopIteration as end:
            return torch.where(mask, end.value, start.x0)
