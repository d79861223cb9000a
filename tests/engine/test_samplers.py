"""Samplers against diffusers' schedulers call by call, and against the original command's own loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from latentmill.engine import SAMPLERS, EngineError, check_steps
from latentmill.engine.sampling import solvers
from latentmill.engine.sampling.denoiser import Prediction
from latentmill.engine.sampling.table import SAMPLER_TABLE
from tests.engine.sampler_tools import (
    CONFIG,
    PREDICTIONS,
    REFERENCES,
    SPACINGS,
    Recorder,
    assert_same_run,
    column,
    model,
    no_noise,
    noise_source,
    original_schedule,
    reference_for,
    run_ours,
    run_reference,
    sample,
    schedule_for,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

STEPS = [1, 2, 3, 14, 15, 20, 30]
DETERMINISTIC = ["ddim", "plms", "euler", "heun", "dpmpp_2m", "dpmpp_2m_karras"]

# What the reference cannot do, or does otherwise: test_the_result_does_not_depend_on_what_the_model_predicts has these.
LEFT_OUT = {("plms", "v_prediction"), ("plms", "sample"), ("euler_a", "sample")}


def start(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def test_every_entry_of_the_table_is_built_and_compared():
    assert list(SAMPLERS) == list(REFERENCES)
    assert all(callable(getattr(solvers, entry.solver)) for entry in SAMPLER_TABLE.values())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call_is_the_references(sampler, spacing, prediction):
    if (sampler, prediction) in LEFT_OUT:
        return
    changes = {"timestep_spacing": spacing, "prediction_type": prediction}
    schedule = schedule_for(**changes)
    for steps in STEPS:
        if spacing == "linspace" and steps == 1:
            continue  # see test_one_step_of_linspace_starts_where_the_noise_is
        if sampler == "heun" and steps == 2:
            continue  # from sigma 14.6 to 0.03 at once: either side's float32 is off by more than is allowed here
        expected = run_reference(reference_for(sampler, **changes), start(), steps)
        assert_same_run(run_ours(sampler, schedule, start(), steps), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
    ids=["linear", "cosine", "zero-snr"],
)
def test_every_call_is_the_references_on_other_schedules(sampler, changes):
    if (sampler, changes.get("prediction_type")) in LEFT_OUT:
        return
    if "rescale_betas_zero_snr" in changes and sampler == "heun":
        return  # the reference ignores the switch here; test_no_signal_at_the_start_is_no_obstacle has it
    if changes.get("beta_schedule") == "squaredcos_cap_v2" and "karras" in sampler:
        return  # the reference cuts timesteps here; see test_karras_levels_tell_the_network_the_nearest_timestep
    expected = run_reference(reference_for(sampler, **changes), start(), 12)
    assert_same_run(run_ours(sampler, schedule_for(**changes), start(), 12), expected)


def test_karras_levels_tell_the_network_the_nearest_timestep():
    for changes in ({}, {"beta_schedule": "squaredcos_cap_v2"}):
        schedule = schedule_for(**changes)
        levels = []

        def denoise(x, level, levels=levels):
            levels.append(level)
            return Prediction(x, x)

        sample("dpmpp_2m_karras", denoise, start(), schedule, 10, no_noise, column(0, 0))
        sigmas = np.array([level.sigma for level in levels])
        assert np.allclose(sigmas[[0, -1]], schedule.sigmas[[-1, 0]], rtol=1e-6)
        assert np.allclose(np.diff(sigmas ** (1 / 7), n=2), 0, atol=1e-6)
        for level in levels:
            nearest = np.abs(np.log(schedule.sigmas) - math.log(level.sigma)).argmin()
            assert abs(level.timestep - nearest) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler", "euler_a", "heun", "dpmpp_2m"])
def test_one_step_of_linspace_starts_where_the_noise_is(sampler):
    schedule = schedule_for(timestep_spacing="linspace")
    _, calls = run_ours(sampler, schedule, start(), 1)
    assert [t for _, t in calls] == [999]


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_result_does_not_depend_on_what_the_model_predicts(sampler, spacing):
    """One predictor of data, asked for noise, for velocity or for data, is one sampler's one picture."""
    results = []
    for prediction in PREDICTIONS:
        schedule = schedule_for(timestep_spacing=spacing, prediction_type=prediction)

        def network(x, t, schedule=schedule, prediction=prediction):
            level = schedule.level(int(t))
            data = torch.tanh(x) + 0.1 * math.cos(t / 200)
            noise = (x - level.signal * data) / level.noise
            return {"epsilon": noise, "v_prediction": level.signal * noise - level.noise * data, "sample": data}[
                prediction
            ]

        results.append(run_ours(sampler, schedule, start(), 12, network)[0])
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= 1e-4 * results[0].abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", [*SPACINGS, "original"])
def test_any_number_of_steps_gives_finite_latents_or_is_refused(sampler, spacing):
    schedule = schedule_for(timestep_spacing=spacing)
    for steps in (1, 2, 3, 37, 998, 999, 1000):
        try:
            check_steps(sampler, schedule.config, steps)
        except EngineError as error:
            with pytest.raises(EngineError, match=str(error).split(",")[0]):
                run_ours(sampler, schedule, start(1, 1, 2, 2), steps)
            continue
        latents, _ = run_ours(sampler, schedule, start(1, 1, 2, 2), steps, lambda x, _: x * 0.5)
        assert torch.isfinite(latents).all(), steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_signal_at_the_start_is_no_obstacle(sampler):
    schedule = schedule_for(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True
    )

    def velocity(x, t):
        """As predicted by one who knows that all data is 0.25, and who is told timesteps near the true level."""
        level = schedule.level(round(t))
        return level.signal * (x - level.signal * 0.25) / level.noise - level.noise * 0.25

    latents, _ = run_ours(sampler, schedule, start(), 10, velocity)
    assert (latents - 0.25).abs().max() <= 0.01


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_draw_no_noise(sampler):
    run_ours(sampler, schedule_for(), start(), 5, draw_noise=no_noise)


def test_ddim_with_eta_uses_each_rows_own_noise_and_leaves_the_others_alone():
    schedule = schedule_for()
    noises = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5 + step)) for step in range(10)]
    pending = iter(noises)
    mixed, _ = run_ours("ddim", schedule, start(), 10, draw_noise=lambda: next(pending), eta=column(0.8, 0.0))
    alone, _ = run_ours("ddim", schedule, start(), 10, draw_noise=no_noise)
    assert torch.equal(mixed[1], alone[1])

    reference = DDIMScheduler.from_config(CONFIG)
    reference.set_timesteps(10)
    expected = start()
    for t, noise in zip(reference.timesteps, noises, strict=True):
        expected = reference.step(model(expected, int(t)), t, expected, eta=0.8, variance_noise=noise).prev_sample
    assert (mixed[0] - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "lcm"])
def test_predicted_data_is_clipped_where_the_config_says_so(sampler, prediction):
    changes = {"clip_sample": True, "clip_sample_range": 0.5, "prediction_type": prediction}
    expected = run_reference(reference_for(sampler, **changes), start() * 3, 10)
    assert_same_run(run_ours(sampler, schedule_for(**changes), start() * 3, 10), expected)


def test_lcm_keeps_the_latents_themselves_as_the_timestep_goes_to_nothing():
    changes = {"timestep_scaling": 0.002}  # at the usual 10 the latents' share is too small to be seen
    expected = run_reference(reference_for("lcm", **changes), start(), 8)
    assert_same_run(run_ours("lcm", schedule_for(**changes), start(), 8), expected)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde_karras"])
def test_clipping_holds_for_samplers_whose_reference_forgets_it(sampler):
    schedule = schedule_for(clip_sample=True, clip_sample_range=0.5)
    latents, _ = run_ours(sampler, schedule, start() * 3, 10)
    assert latents.abs().max() <= 0.5 + 1e-6


# The original command's loops, written anew from what it computes (spacing `original`).


def original_timesteps(steps: int) -> tuple[np.ndarray, np.ndarray]:
    powers = schedule_for().alphas_cumprod.numpy().astype(np.float64)
    visited = np.arange(0, 1000, 1000 // steps) + 1
    return visited, np.array([powers[0], *powers[visited[:-1]]])


def original_ddim_step(x, noise, power, lower, sigma=0.0, fresh=0.0):
    data = (x - math.sqrt(1 - power) * noise) / math.sqrt(power)
    return math.sqrt(lower) * data + math.sqrt(1 - lower - sigma**2) * noise + sigma * fresh


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 50, 199])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_original_spacing_runs_the_original_commands_ddim(steps, eta):
    visited, lower_powers = original_timesteps(steps)
    powers = schedule_for().alphas_cumprod.numpy().astype(np.float64)
    draw = noise_source((2, 4, 8, 8))
    expected = start()
    for t, lower in zip(visited[::-1], lower_powers[::-1], strict=True):
        sigma = eta * math.sqrt((1 - lower) / (1 - powers[t]) * (1 - powers[t] / lower))
        expected = original_ddim_step(expected, model(expected, int(t)), powers[t], lower, sigma, draw())
    found, calls = run_ours("ddim", original_schedule(), start(), steps, eta=eta)
    assert len(calls) == len(visited)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 4, 30, 50])
def test_original_spacing_runs_the_original_commands_plms(steps):
    visited, lower_powers = original_timesteps(steps)
    powers = schedule_for().alphas_cumprod.numpy().astype(np.float64)
    visited, lower_powers = visited[::-1], lower_powers[::-1]
    expected, old = start(), []
    network = Recorder()
    for index, (t, lower) in enumerate(zip(visited, lower_powers, strict=True)):
        noise = network(expected, torch.tensor(int(t)))
        following = visited[min(index + 1, len(visited) - 1)]
        if len(old) == 0:
            ahead = original_ddim_step(expected, noise, powers[t], lower)
            combined = (noise + network(ahead, torch.tensor(int(following)))) / 2
        elif len(old) == 1:
            combined = (3 * noise - old[-1]) / 2
        elif len(old) == 2:
            combined = (23 * noise - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            combined = (55 * noise - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        expected = original_ddim_step(expected, combined, powers[t], lower)
        old = [*old, noise][-3:]
    assert len(network.calls) == len(visited) + 1
    assert_same_run(run_ours("plms", original_schedule(), start(), steps), (expected, network.calls))


@pytest.mark.parametrize("steps", [2, 5, 14, 15, 30, 101])
def test_original_spacing_runs_the_original_commands_dpm_solver(steps):
    """In continuous time from 1 to 1/1000: log signal on a line between timesteps, order 2, but 1 at both ends."""
    log_signal = np.log(schedule_for().alphas_cumprod.numpy().astype(np.float64)) / 2
    times = np.linspace(1, 1 / 1000, steps + 1)
    signal = np.exp(np.interp(times, np.linspace(0, 1, 1001)[1:], log_signal))
    noise = np.sqrt(1 - signal**2)
    log_snr = np.log(signal) - np.log(noise)
    expected, old = start(), None
    for i in range(1, steps + 1):
        output = model(expected, (times[i - 1] - 1 / 1000) * 1000)
        data = (expected - noise[i - 1] * output) / signal[i - 1]
        h = log_snr[i] - log_snr[i - 1]
        step = noise[i] / noise[i - 1] * expected - signal[i] * math.expm1(-h) * data
        if i > 1 and not (i == steps < 15):
            r = (log_snr[i - 1] - log_snr[i - 2]) / h
            step = step - 0.5 * signal[i] * math.expm1(-h) * (data - old) / r
        expected, old = step, data
    found, calls = run_ours("dpmpp_2m", original_schedule(), start(), steps)
    assert len(calls) == steps
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
