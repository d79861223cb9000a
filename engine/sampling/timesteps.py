"""Which timesteps of the training a sampler visits, by the folder's spacing. Without torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.types import EngineError

Timesteps = NDArray[np.float64]
"""Descending, each within 0 to T - 1; whole numbers unless the function says otherwise."""


def whole_timesteps(config: SchedulerConfig, steps: int) -> Timesteps:
    """The spacings of arXiv:2305.08891, table 2, and `original`: those of the latent diffusion authors' scripts.

    `original` is every (T // steps)-th timestep, plus 1: often more of them than `steps`, as in those scripts. One
    timestep by `linspace` is the last one, where the noise is, and not the first one as in diffusers.
    """
    return _fitting(lambda config, steps: np.round(_spaced(config, steps)), config, steps)


def continuous_timesteps(config: SchedulerConfig, steps: int) -> Timesteps:
    """As `whole_timesteps`, but `linspace` is not rounded: its timesteps lie between those of the training."""
    return _fitting(_spaced, config, steps)


def solver_timesteps(config: SchedulerConfig, steps: int) -> Timesteps:
    """DPM-Solver's: one more than `steps` is spaced and the lowest left out, except by `trailing`, which has none at 0.

    `original` is not rounded: uniform in time, as in the solver's own code.
    """
    return _fitting(_solver_spaced, config, steps)


def distilled_timesteps(config: SchedulerConfig, steps: int) -> Timesteps:
    """Evenly many of those that a latent consistency model was distilled on, from the highest (arXiv:2310.04378).

    The folder's `original_inference_steps` counts them; its spacing plays no part.
    """
    return _fitting(_distilled, config, steps)


def check_range(config: SchedulerConfig, steps: int) -> None:
    """Raises EngineError for a number of steps outside the schedule: all that placing levels without timesteps asks."""
    total = config.num_train_timesteps
    if not 1 <= steps <= total:
        raise EngineError(f"num_inference_steps is {steps}; this model takes 1 to {total}")


_Grid = Callable[[SchedulerConfig, int], Timesteps]


def _fitting(grid: _Grid, config: SchedulerConfig, steps: int) -> Timesteps:
    """The grid's timesteps if they lie within the schedule and no two are the same, else EngineError."""
    total = config.num_train_timesteps

    def fits(timesteps: Timesteps) -> bool:
        return bool(timesteps[0] < total and timesteps[-1] >= 0 and (timesteps[1:] < timesteps[:-1]).all())

    check_range(config, steps)
    timesteps = grid(config, steps)
    if fits(timesteps):
        return timesteps
    others = sorted(range(1, total + 1), key=lambda other: abs(other - steps))
    nearest = next((other for other in others if fits(grid(config, other))), None)
    remedy = "no number does: use another sampler or timestep spacing"
    raise EngineError(
        f"num_inference_steps is {steps}, whose timesteps do not fit this model's schedule "
        f"({config.timestep_spacing} spacing, 0 to {total - 1}); "
        f"{remedy if nearest is None else f'the nearest number that does is {nearest}'}"
    )


def _spaced(config: SchedulerConfig, steps: int) -> Timesteps:
    total = config.num_train_timesteps
    if config.timestep_spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + config.steps_offset
    if config.timestep_spacing == "trailing":
        # Rounding errors may give the range one element too many, at 0.
        return np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    if config.timestep_spacing == "original":
        return np.arange(0, total, total // steps, dtype=np.float64)[::-1] + 1
    return _uniform(total, max(steps, 2))[:steps]


def _solver_spaced(config: SchedulerConfig, steps: int) -> Timesteps:
    total = config.num_train_timesteps
    if config.timestep_spacing == "leading":
        return np.arange(steps, 0, -1, dtype=np.float64) * (total // (steps + 1)) + config.steps_offset
    if config.timestep_spacing == "trailing":
        return _spaced(config, steps)
    uniform = _uniform(total, steps + 1)[:-1]
    return uniform if config.timestep_spacing == "original" else np.round(uniform)


def _uniform(total: int, count: int) -> Timesteps:
    """Both ends included. Counted from 0 and reversed, so that a tie is rounded as diffusers rounds it."""
    return np.linspace(0, total - 1, count)[::-1]


def _distilled(config: SchedulerConfig, steps: int) -> Timesteps:
    count = config.original_inference_steps
    trained = np.arange(count, 0, -1, dtype=np.float64) * (config.num_train_timesteps // count) - 1
    return trained[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(np.int64)]
