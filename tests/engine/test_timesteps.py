"""Schedules, and which timesteps each sampler visits: diffusers', the original command's, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from latentmill.engine import SAMPLERS, EngineError, check_steps
from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.sampling.levels import PLACEMENTS
from latentmill.engine.sampling.noise_level import NoiseLevel
from latentmill.engine.sampling.timesteps import (
    continuous_timesteps,
    distilled_timesteps,
    solver_timesteps,
    whole_timesteps,
)
from tests.engine.sampler_tools import CONFIG, SPACINGS, original_schedule, reference_for, schedule_for

GRIDS = {"ddim": whole_timesteps, "euler": continuous_timesteps, "dpmpp_2m": solver_timesteps}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

ORIGINAL_REFUSES = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}
ORIGINAL_KEEPS = {1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_forward_process_is_the_references(beta_schedule, zero_snr):
    changes = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    ours = schedule_for(**changes).alphas_cumprod
    reference = DDIMScheduler.from_config({**CONFIG, **changes}).alphas_cumprod
    assert torch.allclose(ours, reference, rtol=1e-6, atol=1e-9)


def test_a_level_is_one_point_in_both_scales():
    level = NoiseLevel.from_sigma(3.5, 2.0)
    assert level.sigma == pytest.approx(2.0)
    assert level.signal**2 + level.noise**2 == pytest.approx(1)
    assert level.noise / level.signal == pytest.approx(2.0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", GRIDS)
def test_every_number_of_steps_visits_the_references_timesteps_or_is_refused(sampler, spacing):
    config = schedule_for(timestep_spacing=spacing).config
    reference = reference_for(sampler, timestep_spacing=spacing)
    refused = []
    for steps in range(1, 1001):
        try:
            found = GRIDS[sampler](config, steps)
        except EngineError as error:
            refused.append((steps, str(error)))
            continue
        reference.set_timesteps(steps)
        if spacing == "linspace" and steps == 1:
            # The reference's one timestep is then 0 but for its solver, where there is no noise to take away.
            assert found.tolist() == [999]
        else:
            # By a rounding error the reference's trailing spacing has, for a few numbers, one timestep more: -1.
            assert np.abs(found - reference.timesteps.numpy()[:steps]).max() <= 1e-3, steps
    expected = {
        ("ddim", "leading"): {1000: 999},
        ("euler", "leading"): {1000: 999},
        ("dpmpp_2m", "leading"): {999: 998, 1000: 998},
        ("dpmpp_2m", "linspace"): {1000: 999},
    }.get((sampler, spacing), {})
    assert {steps: int(reason.rsplit(" ", 1)[1]) for steps, reason in refused} == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 17, 33, 50])
def test_a_distilled_model_visits_the_timesteps_it_was_distilled_on(steps):
    reference = reference_for("lcm")
    reference.set_timesteps(steps)
    assert distilled_timesteps(schedule_for().config, steps).tolist() == reference.timesteps.tolist()


def test_a_distilled_model_takes_no_more_steps_than_it_was_distilled_on():
    for count in (50, 100):
        config = schedule_for(original_inference_steps=count).config
        check_steps("lcm", config, count)
        with pytest.raises(EngineError, match=f"is 300, .* the nearest number that does is {count}"):
            check_steps("lcm", config, 300)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_step_counts_outside_the_schedule_are_refused(sampler, steps):
    with pytest.raises(EngineError, match=f"num_inference_steps is {steps}; this model takes 1 to 1000"):
        check_steps(sampler, schedule_for().config, steps)


def test_a_number_refused_names_one_that_is_not():
    for sampler in SAMPLERS:
        for spacing in (*SPACINGS, "original"):
            config = dataclasses.replace(schedule_for().config, timestep_spacing=spacing)
            for steps in (1, 3, 60, 301, 1000):
                try:
                    check_steps(sampler, config, steps)
                except EngineError as error:
                    check_steps(sampler, config, int(str(error).rsplit(" ", 1)[1]))


def test_original_spacing_is_that_of_the_original_command():
    schedule = original_schedule()
    for steps in [*range(1, 520), 999, 1000]:
        visited = np.arange(0, 1000, 1000 // steps) + 1
        if steps in ORIGINAL_REFUSES:
            with pytest.raises(EngineError, match=f"num_inference_steps is {steps}, .*original spacing"):
                PLACEMENTS["strides"].place(schedule, steps)
            continue
        taken = PLACEMENTS["strides"].place(schedule, steps).steps
        assert [step.here.timestep for step in taken] == visited[::-1].tolist()
        assert [step.next.timestep for step in taken] == [*visited[-2::-1].tolist(), 0]
        assert (len(taken) == steps) == (steps in ORIGINAL_KEEPS)


def test_original_spacing_is_refused_with_the_nearest_number():
    for steps, nearest in {3: 2, 9: 8, 37: 38, 111: 112, 251: 250, 333: 334, 1000: 500}.items():
        with pytest.raises(EngineError, match=f"nearest number that does is {nearest}$"):
            check_steps("ddim", original_schedule().config, steps)


@pytest.mark.parametrize(
    "switch", [{"timestep_type": "continuous"}, {"sigma_max": 700.0}, {"timestep_spacing": "evenly"}]
)
def test_switches_that_would_change_the_schedule_are_refused(switch):
    with pytest.raises(EngineError, match=next(iter(switch))):
        SchedulerConfig.from_dict({**CONFIG, **switch})


def test_a_schedule_that_no_number_of_steps_fits_is_refused_in_one_line():
    config = schedule_for(num_train_timesteps=40, original_inference_steps=50).config
    with pytest.raises(EngineError, match=r"num_inference_steps is 4, .* no number does: use another sampler"):
        distilled_timesteps(config, 4)
