"""How samplers place noise levels. Without torch: the planner refuses a number of steps in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.sampling.noise_level import LEAST_ALPHA_BAR, NoiseLevel
from latentmill.engine.sampling.table import FLOW_SAMPLERS, SAMPLER_TABLE
from latentmill.engine.sampling.timesteps import (
    Timesteps,
    check_range,
    continuous_timesteps,
    distilled_timesteps,
    solver_timesteps,
    whole_timesteps,
)
from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from latentmill.engine.sampling.schedule import NoiseSchedule

_KARRAS_RHO = 7.0


class Step(NamedTuple):
    """One step of a sampler: from a level to the next one."""

    here: NoiseLevel
    next: NoiseLevel


class Correction(NamedTuple):
    """How a first step is made once more: the level that the model is told at its end, and the step itself."""

    end: NoiseLevel
    step: Step


@dataclass(frozen=True, slots=True)
class Levels:
    """What a sampler visits: its steps in order.

    The initial noise counts as latents of variance 1 at the first level, or as the noise in them alone where
    `starts_as_noise`: diffusers' convention for spacings that begin at the last timestep. `correction` belongs to
    PLMS, `timestep_scaling` to distilled models.
    """

    steps: list[Step]
    starts_as_noise: bool = False
    correction: Correction | None = None
    timestep_scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class Placement:
    """A way to place levels of diffusion. `check` raises EngineError that names the nearest number of steps."""

    check: Callable[[SchedulerConfig, int], object]
    place: Callable[[NoiseSchedule, int], Levels]


_CLEAN = NoiseLevel(0, 1.0, 0.0)


def _strides(schedule: NoiseSchedule, steps: int) -> Levels:
    """Timesteps of the training, each with the one a stride below.

    As in diffusers, the stride is T // steps: where that does not divide (trailing, linspace), a step ends a little
    above the next timestep. By `original` spacing a step ends at the next timestep, the last one at 0.
    """
    timesteps = [int(timestep) for timestep in whole_timesteps(schedule.config, steps)]
    if schedule.config.timestep_spacing == "original":
        pairs = list(pairwise([*timesteps, 0]))
    else:
        stride = schedule.config.num_train_timesteps // steps
        pairs = [(timestep, timestep - stride) for timestep in timesteps]
    return Levels([Step(schedule.level(here), schedule.level(after)) for here, after in pairs])


def _corrected_strides(schedule: NoiseSchedule, steps: int) -> Levels:
    """As `_strides`, with a correction of the first step.

    As in diffusers, that is one stride which ends at the next timestep, wherever rounding has put it; a single step is
    not corrected. By `original` spacing a single step is corrected too, at its own timestep. A step from a level
    without signal cannot be corrected.
    """
    strides = _strides(schedule, steps).steps
    first, second = strides[0], strides[min(1, len(strides) - 1)]
    original = schedule.config.timestep_spacing == "original"
    if first.here.signal == 0 or (len(strides) == 1 and not original):
        return Levels(strides)
    start = int(second.here.timestep + first.here.timestep - first.next.timestep)
    step = first if original else Step(schedule.level(start), second.here)
    return Levels(strides, correction=Correction(second.here, step))


def _spaced(schedule: NoiseSchedule, steps: int) -> Levels:
    levels = _interpolated(schedule, continuous_timesteps(schedule.config, steps))
    return Levels(_to_clean(levels), schedule.config.timestep_spacing in {"trailing", "linspace"})


def _solver_spaced(schedule: NoiseSchedule, steps: int) -> Levels:
    """DPM-Solver's. By `original` spacing uniform in time, down to the lowest level of the training and not to none."""
    timesteps = solver_timesteps(schedule.config, steps)
    if schedule.config.timestep_spacing != "original":
        return Levels(_to_clean(_interpolated(schedule, timesteps)))
    alpha_bars = np.maximum(schedule.alphas_cumprod.numpy().astype(np.float64), LEAST_ALPHA_BAR)
    timesteps = np.append(timesteps, 0)
    alpha_bars = np.exp(np.interp(timesteps, np.arange(len(alpha_bars)), np.log(alpha_bars)))
    levels = map(NoiseLevel.from_alpha_bar, timesteps.tolist(), alpha_bars.tolist())
    return Levels([Step(*pair) for pair in pairwise(levels)])


def _karras(schedule: NoiseSchedule, steps: int) -> Levels:
    """From the highest sigma of the training to the lowest, evenly in their seventh root (arXiv:2206.00364, eq. 5).

    The network is told the nearest timestep by the logarithm of sigma, a whole number as in diffusers.
    """
    check_range(schedule.config, steps)
    known = schedule.sigmas
    roots = np.linspace(known[-1] ** (1 / _KARRAS_RHO), known[0] ** (1 / _KARRAS_RHO), steps)
    sigmas = roots**_KARRAS_RHO
    timesteps = np.round(np.interp(np.log(sigmas), np.log(known), np.arange(len(known))))
    return Levels(_to_clean(list(map(NoiseLevel.from_sigma, timesteps.tolist(), sigmas.tolist()))))


def _distilled(schedule: NoiseSchedule, steps: int) -> Levels:
    timesteps = distilled_timesteps(schedule.config, steps)
    levels = [schedule.level(int(timestep)) for timestep in timesteps]
    return Levels(_to_clean(levels), timestep_scaling=schedule.config.timestep_scaling)


def _shifted(config: SchedulerConfig, shift: float, steps: int) -> list[NoiseLevel]:
    """Flow matching's levels from noise alone on, spaced evenly and then shifted, as in diffusers.

    By `linspace` the lowest level of the training, from which they are spaced, is a shifted one already, unless the
    shift is dynamic. By `trailing` they are spaced from 1 to 1 / steps, as Flux's authors do.
    """
    total = config.num_train_timesteps
    lowest = 1 / total
    if config.timestep_spacing == "trailing":
        lowest = 1 / steps
    elif config.flow is not None and not config.flow.dynamic:
        lowest = _shift(lowest, shift)
    sigmas = _shift(np.linspace(1.0, lowest, steps), shift)
    return [NoiseLevel.from_flow(sigma * total, sigma) for sigma in sigmas.tolist()]


def _solver_shifted(config: SchedulerConfig, shift: float, steps: int) -> list[NoiseLevel]:
    """DPM-Solver's for flow matching, which begins a little below noise alone: lambda is infinite there.

    As in diffusers, the network is told whole timesteps, rounded down; so the signal is spaced and not the noise.
    """
    total = config.num_train_timesteps
    sigmas = _shift(1 - np.linspace(1.0, 1 / total, steps + 1), shift)[:0:-1]
    return [NoiseLevel.from_flow(int(sigma * total), sigma) for sigma in sigmas.tolist()]


_Number = TypeVar("_Number", float, NDArray[np.float64])


def _shift(sigma: _Number, shift: float) -> _Number:
    """arXiv:2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _interpolated(schedule: NoiseSchedule, timesteps: Timesteps) -> list[NoiseLevel]:
    """Between timesteps of the training, sigma is interpolated linearly, as in diffusers."""
    sigmas = np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas)
    return list(map(NoiseLevel.from_sigma, timesteps.tolist(), sigmas.tolist()))


def _to_clean(levels: list[NoiseLevel]) -> list[Step]:
    """Steps from each level to the next, and from the last one to no noise."""
    return [Step(*pair) for pair in pairwise([*levels, _CLEAN])]


PLACEMENTS: Mapping[str, Placement] = MappingProxyType(
    {
        "strides": Placement(whole_timesteps, _strides),
        "corrected strides": Placement(whole_timesteps, _corrected_strides),
        "spaced": Placement(continuous_timesteps, _spaced),
        "solver spaced": Placement(solver_timesteps, _solver_spaced),
        "karras": Placement(check_range, _karras),
        "distilled": Placement(distilled_timesteps, _distilled),
    }
)


FLOW_PLACEMENTS: Mapping[str, Callable[[SchedulerConfig, float, int], list[NoiseLevel]]] = MappingProxyType(
    {"shifted": _shifted, "solver shifted": _solver_shifted}
)
"""Ways to place levels of flow matching, by its config, the shift for a size, and the number of steps."""


def place_levels(sampler: str, schedule: NoiseSchedule, steps: int, cells: int) -> Levels:
    """What a sampler visits, for latents of so many cells. Raises EngineError if it cannot take so many steps."""
    entry, config = SAMPLER_TABLE[sampler], schedule.config
    if config.flow is None:
        return PLACEMENTS[entry.levels].place(schedule, steps)
    check_steps(sampler, config, steps)
    if entry.flow is None:
        raise EngineError(f"sampler {sampler!r} is not for models of flow matching; use {' or '.join(FLOW_SAMPLERS)}")
    _, levels = entry.flow
    shift = config.flow.factor(cells // schedule.patch_size**2)
    return Levels(_to_clean(FLOW_PLACEMENTS[levels](config, shift, steps)))


def check_steps(sampler: str, config: SchedulerConfig, steps: int) -> None:
    """Raises EngineError that names the nearest number of steps that works, if `steps` does not."""
    check = PLACEMENTS[SAMPLER_TABLE[sampler].levels].check if config.flow is None else check_range
    check(config, steps)
