"""The samplers: one entry each, from which all lists, checks and labels come. Without torch or NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A name's meaning: a function of solvers.py, over levels placed in one of the ways of levels.py.

    `stochastic` puts noise in at each step; `takes_eta` leaves the amount to the request. `label` is the name that web
    UIs use. `passes` is how often a step runs the model, about: what a row costs. `flow` is solver and levels for
    models of flow matching; without it the sampler is not for them.
    """

    solver: str
    levels: str
    label: str
    stochastic: bool = False
    takes_eta: bool = False
    passes: int = 1
    flow: tuple[str, str] | None = None


SAMPLER_TABLE: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(solver="ddim", levels="strides", label="DDIM", takes_eta=True),
        "plms": Sampler(solver="plms", levels="corrected strides", label="PLMS"),
        "euler": Sampler(solver="euler", levels="spaced", label="Euler", flow=("flow_euler", "shifted")),
        "euler_a": Sampler(solver="euler", levels="spaced", label="Euler a", stochastic=True),
        "heun": Sampler(solver="heun", levels="spaced", label="Heun", passes=2),
        "dpmpp_2m": Sampler(
            solver="dpmpp_2m",
            levels="solver spaced",
            label="DPM++ 2M",
            flow=("dpmpp_2m", "solver shifted"),
        ),
        "dpmpp_2m_karras": Sampler(solver="dpmpp_2m", levels="karras", label="DPM++ 2M Karras"),
        "dpmpp_2m_sde": Sampler(solver="dpmpp_2m", levels="solver spaced", label="DPM++ 2M SDE", stochastic=True),
        "dpmpp_2m_sde_karras": Sampler(
            solver="dpmpp_2m", levels="karras", label="DPM++ 2M SDE Karras", stochastic=True
        ),
        "lcm": Sampler(solver="lcm", levels="distilled", label="LCM", stochastic=True),
    }
)
"""The engine's own algorithms. `lcm` is for models distilled for it, the others for any latent diffusion model."""

SAMPLERS = tuple(SAMPLER_TABLE)

FLOW_SAMPLERS = tuple(name for name, sampler in SAMPLER_TABLE.items() if sampler.flow is not None)
"""Those that models of flow matching take, and the only ones."""

SAMPLERS_WITH_ETA = tuple(name for name, sampler in SAMPLER_TABLE.items() if sampler.takes_eta)
"""Samplers whose noise eta scales. The others take no eta but 0: their noise, if any, is part of the algorithm."""

FOLDER_SAMPLER = "default"
"""The one sampler of pipelines that run by the library diffusers: the scheduler of the model's own folder."""

SAMPLER_LABELS = {**{name: sampler.label for name, sampler in SAMPLER_TABLE.items()}, FOLDER_SAMPLER: "Default"}
"""Every sampler in the words of web UIs."""

SAMPLER_CHOICES = tuple(SAMPLER_LABELS)
"""All that `GenerationRequest.sampler` takes; `ModelDescription.samplers` says which of them a model does."""
