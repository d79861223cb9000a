"""Flow matching's levels and samplers against diffusers' schedulers call by call, and what they refuse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from latentmill.engine import EngineError, check_steps
from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.sampling.denoiser import Prediction
from latentmill.engine.sampling.levels import place_levels
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.table import FLOW_SAMPLERS, SAMPLER_TABLE
from tests.engine.sampler_tools import Recorder, assert_same_run, column, model, no_noise, run_ours, sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

STEPS = [1, 2, 3, 14, 15, 28, 50]
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX = {
    **SD3,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "timestep_spacing": "trailing",
}
SCHNELL = {**FLUX, "shift": 1.0, "use_dynamic_shifting": False}
CONFIGS = {
    "sd3": SD3,
    "flux-dev": FLUX,
    "flux-schnell": SCHNELL,
    "dynamic linspace": {**SD3, **FLUX} | {"timestep_spacing": "linspace"},
}


def schedule_for(config: dict) -> NoiseSchedule:
    return NoiseSchedule(SchedulerConfig.from_dict(config), patch_size=2)


def start(side: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, side, 2 * side, generator=torch.Generator().manual_seed(0))


def mu(tokens: int) -> float:
    """Flux's own line through its two points."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return tokens * slope + 0.5 - slope * 256


def reference(config: dict, sampler: str, steps: int, tokens: int):
    """diffusers' scheduler with its timesteps set as the pipeline of the model sets them."""
    dynamic = {"mu": mu(tokens)} if config.get("use_dynamic_shifting") else {}
    if sampler == "dpmpp_2m":
        own = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
        scheduler = DPMSolverMultistepScheduler(
            **own, use_dynamic_shifting=bool(dynamic), time_shift_type="exponential"
        )
        scheduler.set_timesteps(steps, **dynamic)
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    trailing = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if config.get("timestep_spacing") == "trailing" else {}
    scheduler.set_timesteps(steps, **trailing, **dynamic)
    return scheduler


def run_reference(scheduler, latents):
    network = Recorder()
    for t in scheduler.timesteps:
        latents = scheduler.step(network(latents, t), t, latents).prev_sample
    return latents, network.calls


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_every_call_is_the_references(sampler, name):
    for side in (8, 64):
        noise = start(side)
        for steps in STEPS if side == 8 else [5]:
            expected = run_reference(reference(CONFIGS[name], sampler, steps, side * side // 2), noise)
            assert_same_run(run_ours(sampler, schedule_for(CONFIGS[name]), noise, steps), expected)


def test_a_dynamic_shift_grows_with_the_picture():
    shift = SchedulerConfig.from_dict(FLUX).flow
    assert math.isclose(shift.factor(256), math.exp(0.5))
    assert math.isclose(shift.factor(4096), math.exp(1.15))
    assert shift.factor(4096) < shift.factor(9216)
    assert SchedulerConfig.from_dict(SD3).flow.factor(9216) == 3.0


def exact(x: torch.Tensor, sigma: float, spread: float = 0.5, mean: float = 0.3) -> torch.Tensor:
    """Where the flow takes latents of a level if the data are normal: they keep their place in the distribution."""
    return mean + spread * (x - (1 - sigma) * mean) / math.hypot((1 - sigma) * spread, sigma)


def gaussian(latents, level, spread: float = 0.5, mean: float = 0.3) -> Prediction:
    """What a perfect model predicts of latents if the data are normal."""
    variance = (level.signal * spread) ** 2 + level.noise**2
    left = latents - level.signal * mean
    return Prediction(left * level.noise / variance, mean + left * level.signal * spread**2 / variance)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_solver(sampler, order):
    noise = start().double()
    errors = []
    for steps in (200, 400, 800):
        found = sample(sampler, gaussian, noise, schedule_for(SCHNELL), steps, no_noise, column(0, 0))
        first = place_levels(sampler, schedule_for(SCHNELL), steps, 64).steps[0].here
        errors.append(float((found - exact(noise, first.noise)).abs().mean()))
    rates = [math.log2(worse / better) for worse, better in itertools.pairwise(errors)]
    assert all(rate > order - 0.3 for rate in rates), rates


def test_only_samplers_with_a_form_for_it_are_taken():
    assert FLOW_SAMPLERS == ("euler", "dpmpp_2m")
    for sampler in SAMPLER_TABLE.keys() - set(FLOW_SAMPLERS):
        with pytest.raises(EngineError, match="not for models of flow matching; use euler or dpmpp_2m"):
            run_ours(sampler, schedule_for(SD3), start(), 4)


@pytest.mark.parametrize("steps", [0, 1001])
def test_the_number_of_steps_is_that_of_the_training_at_most(steps):
    with pytest.raises(EngineError, match="this model takes 1 to 1000"):
        check_steps("euler", SchedulerConfig.from_dict(SD3), steps)


def test_betas_are_refused_where_there_are_none():
    with pytest.raises(EngineError, match="no betas"):
        schedule_for(SD3).level(10)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"invert_sigmas": True}, "invert_sigmas=True"),
        ({"shift_terminal": 0.1}, r"shift_terminal=0\.1"),
        ({"stochastic_sampling": True}, "stochastic_sampling=True"),
        ({"time_shift_type": "linear"}, "time_shift_type='linear'"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"timestep_spacing": "leading"}, "timestep_spacing='leading'"),
        ({"shift": 0}, "shift=0: expected a number"),
        ({"max_image_seq_len": 256}, "max_image_seq_len=256: expected a whole number from 257"),
    ],
)
def test_a_switch_that_is_not_built_is_refused_by_name(change, named):
    with pytest.raises(EngineError, match=named):
        SchedulerConfig.from_dict({**FLUX, **change})


def test_the_jobs_choices_must_go_with_the_kind_of_model():
    flow, diffusion = SchedulerConfig.from_dict(SD3), SchedulerConfig.from_dict({})
    assert flow.overridden("flow", "trailing").timestep_spacing == "trailing"
    assert flow.overridden(None, None) == flow
    with pytest.raises(EngineError, match=r"of flow matching, but the job has prediction_type='epsilon'.*'flow'"):
        flow.overridden("epsilon", None)
    with pytest.raises(EngineError, match="timestep_spacing='original'"):
        flow.overridden(None, "original")
    with pytest.raises(EngineError, match="the job has prediction_type='flow'"):
        diffusion.overridden("flow", None)


def test_the_flow_that_a_model_predicts_is_noise_less_data():
    noise, x0 = start(), start().flip(0)
    schedule = schedule_for(SD3)
    latents, calls = run_ours("euler", schedule, noise, 3, function=lambda x, t: (noise - x0) + 0 * model(x, t))
    assert torch.allclose(latents, x0, atol=1e-5)
    assert calls[0][1] == 1000
