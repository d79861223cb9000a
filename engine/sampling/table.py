"""The samplers: one entry each, from which all lists, checks and labels come. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from latentmill.engine.loading.config import SchedulerConfig
from latentmill.engine.sampling.levels import (
    CORRECTED_STRIDES,
    DISTILLED,
    KARRAS,
    SOLVER_SPACED,
    SPACED,
    STRIDES,
    Placement,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A name's meaning: a function of sampling/solvers.py over levels placed one way.

    `stochastic` puts noise in at each step; `takes_eta` leaves the amount to the request. `label` is the name that web
    UIs use.
    """

    solver: str
    levels: Placement
    label: str
    stochastic: bool = False
    takes_eta: bool = False

    @property
    def draws_noise(self) -> bool:
        """Whether it may draw noise beside the initial one."""
        return self.stochastic or self.takes_eta


SAMPLER_TABLE: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(solver="ddim", levels=STRIDES, label="DDIM", takes_eta=True),
        "plms": Sampler(solver="plms", levels=CORRECTED_STRIDES, label="PLMS"),
        "euler": Sampler(solver="euler", levels=SPACED, label="Euler"),
        "euler_a": Sampler(solver="euler", levels=SPACED, label="Euler a", stochastic=True),
        "heun": Sampler(solver="heun", levels=SPACED, label="Heun"),
        "dpmpp_2m": Sampler(solver="dpmpp_2m", levels=SOLVER_SPACED, label="DPM++ 2M"),
        "dpmpp_2m_karras": Sampler(solver="dpmpp_2m", levels=KARRAS, label="DPM++ 2M Karras"),
        "dpmpp_2m_sde": Sampler(solver="dpmpp_2m", levels=SOLVER_SPACED, label="DPM++ 2M SDE", stochastic=True),
        "dpmpp_2m_sde_karras": Sampler(solver="dpmpp_2m", levels=KARRAS, label="DPM++ 2M SDE Karras", stochastic=True),
        "lcm": Sampler(solver="lcm", levels=DISTILLED, label="LCM", stochastic=True),
    }
)
"""The engine's own algorithms. `lcm` is for models distilled for it, the others for any latent diffusion model."""

SAMPLERS = tuple(SAMPLER_TABLE)

SAMPLERS_WITH_ETA = tuple(name for name, sampler in SAMPLER_TABLE.items() if sampler.takes_eta)
"""Samplers whose noise eta scales. The others take no eta but 0: their noise, if any, is part of the algorithm."""

FOLDER_SAMPLER = "default"
"""The one sampler of pipelines that run by the library diffusers: the scheduler of the model's own folder."""

SAMPLER_LABELS = {**{name: sampler.label for name, sampler in SAMPLER_TABLE.items()}, FOLDER_SAMPLER: "Default"}
"""Every sampler in the words of web UIs."""

SAMPLER_CHOICES = tuple(SAMPLER_LABELS)
"""All that `GenerationRequest.sampler` takes; `ModelDescription.samplers` says which of them a model does."""


def check_steps(sampler: str, config: SchedulerConfig, steps: int) -> None:
    """Raises EngineError that names the nearest number of steps that works, if `steps` does not."""
    SAMPLER_TABLE[sampler].levels.check(config, steps)
