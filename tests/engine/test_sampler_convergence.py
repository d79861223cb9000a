"""Samplers against an analytic oracle: data ~ N(mu, s^2), whose exact denoiser and exact ODE solution are known.

The predicted data is E[data | x] = (s^2 x + sigma^2 mu) / (s^2 + sigma^2), for x = data + sigma * noise, and the
probability-flow ODE keeps (x - mu) / sqrt(s^2 + sigma^2) constant.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import PNDMScheduler

from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.sampling.denoiser import Prediction
from latentmill.engine.sampling.schedule import NoiseSchedule
from tests.engine.sampler_tools import CONFIG, column, no_noise, noise_source, sample

MU, S = 0.3, 0.8


def posterior_mean(x, sigma):
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def ode_solution(x, sigma, lower_sigma):
    return MU + (x - MU) * math.sqrt((S**2 + lower_sigma**2) / (S**2 + sigma**2))


class Oracle:
    """The exact denoiser; remembers the latents and level of its first call, and the level of its last."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, level):
        self.calls.append((latents, level))
        data = posterior_mean(latents / level.signal, level.sigma)
        return Prediction((latents - level.signal * data) / level.noise, data)

    def start(self):
        latents, level = self.calls[0]
        return latents / level.signal, level.sigma


def smooth_schedule(spacing="leading", **changes) -> NoiseSchedule:
    """4096 timesteps down to sigma 0.5, no lower: there noise goes smoothly with time, so that orders show cleanly."""
    betas = [0.2, *torch.linspace(1e-4, 3e-3, 4095, dtype=torch.float64).tolist()]
    return NoiseSchedule(
        SchedulerConfig.from_dict(
            {
                "num_train_timesteps": 4096,
                "trained_betas": betas,
                "clip_sample": False,
                "set_alpha_to_one": False,
                "timestep_spacing": spacing,
                **changes,
            }
        )
    )


def error(sampler, schedule, steps, ends_at_lowest_level):
    """Largest distance to the exact solution: at the lowest level, or as predicted from the last one visited."""
    oracle = Oracle()
    noise = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sample(sampler, oracle, noise, schedule, steps, no_noise, column(0.0))
    assert found.dtype == torch.float64
    x, sigma = oracle.start()
    if ends_at_lowest_level:
        lowest = schedule.level(0)
        expected = lowest.signal * ode_solution(x, sigma, lowest.sigma)
    else:
        last = oracle.calls[-1][1].sigma
        expected = posterior_mean(ode_solution(x, sigma, last), last)
    return float((found - expected).abs().max())


# (sampler, spacing, numbers of steps that halve the stride, does it end at the lowest level?, least order, most order)
ORDERS = [
    ("ddim", "leading", (32, 64, 128, 256), True, 0.9, 1.15),
    ("euler", "leading", (32, 64, 128, 256), False, 0.9, 1.15),
    ("heun", "leading", (32, 64, 128, 256), False, 1.9, 2.3),
    ("dpmpp_2m", "leading", (31, 63, 127, 255), False, 1.8, 2.3),
    ("dpmpp_2m", "original", (32, 64, 128, 256), True, 1.8, 2.3),
    ("dpmpp_2m_karras", "leading", (129, 257, 513, 1025), False, 1.9, 2.5),
    ("plms", "leading", (32, 64, 128, 256), True, 1.9, 2.3),
    ("ddim", "trailing", (32, 64, 128, 256), True, 0.9, 1.15),
]


@pytest.mark.parametrize(("sampler", "spacing", "numbers", "to_lowest", "least", "most"), ORDERS)
def test_order_of_convergence(sampler, spacing, numbers, to_lowest, least, most):
    schedule = smooth_schedule(spacing)
    errors = [error(sampler, schedule, steps, to_lowest) for steps in numbers]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(least <= slope <= most for slope in slopes)
    assert errors[-1] < 0.02


def test_plms_keeps_its_order_where_the_reference_loses_it():
    """Asked for velocities, the reference combines those: why its pictures are not ours for such models."""
    schedule = smooth_schedule()

    def reference_error(steps):
        reference = PNDMScheduler(
            num_train_timesteps=4096,
            trained_betas=schedule.config.trained_betas,
            prediction_type="v_prediction",
            skip_prk_steps=True,
        )
        reference.set_timesteps(steps)
        oracle = Oracle()
        x = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for t in reference.timesteps:
            level = schedule.level(int(t))
            prediction = oracle(x, level)
            x = reference.step(level.signal * prediction.noise - level.noise * prediction.x0, t, x).prev_sample
        lowest = schedule.level(0)
        return float((x - lowest.signal * ode_solution(*oracle.start(), lowest.sigma)).abs().max())

    assert math.log2(reference_error(64) / reference_error(128)) < 1.2
    assert error("plms", schedule, 128, ends_at_lowest_level=True) < reference_error(128) / 20


def moments(sampler, steps, eta=0.0, denoise=None, count=100_000):
    """Mean and standard deviation of many samples, as (mean - MU) / S and (deviation / S - 1)."""
    schedule = NoiseSchedule(SchedulerConfig.from_dict(CONFIG))
    draw_noise = noise_source((count, 1, 1, 1))
    found = sample(sampler, denoise or Oracle(), draw_noise(), schedule, steps, draw_noise, column(eta))
    return (float(found.mean()) - MU) / S, float(found.std()) / S - 1


@pytest.mark.parametrize(
    ("sampler", "eta", "steps"),
    [("ddim", 1.0, 25), ("euler_a", 0.0, 25), ("dpmpp_2m_sde", 0.0, 10), ("dpmpp_2m_sde_karras", 0.0, 10)],
)
def test_many_samples_come_to_have_the_datas_moments(sampler, eta, steps):
    """Noise put in must be as much as was taken away: too little or too much shows in the deviation of many samples."""
    coarse, fine = moments(sampler, steps, eta), moments(sampler, 8 * steps, eta)
    assert abs(fine[0]) <= 0.015
    assert abs(fine[1]) <= 0.03
    assert abs(fine[1]) <= abs(coarse[1]) / 3


def test_half_the_noise_of_eta_still_samples_the_data():
    mean, deviation = moments("ddim", 200, eta=0.5)
    assert abs(mean) <= 0.03
    assert abs(deviation) <= 0.02


def test_ancestral_sampling_is_ddim_with_eta_one():
    ancestral, ddpm = moments("euler_a", 50), moments("ddim", 50, eta=1.0)
    assert ancestral == pytest.approx(ddpm, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_perfect_consistency_model_needs_no_more_than_one_step(steps):
    """What a latent consistency model is distilled to be: at every level, the end of the ODE's path."""

    def distilled(latents, level):
        return Prediction(latents, ode_solution(latents / level.signal, level.sigma, 0.0))

    mean, deviation = moments("lcm", steps, denoise=distilled)
    assert abs(mean) <= 0.03
    assert abs(deviation) <= 0.01


def test_any_other_model_is_not_for_lcm():
    """As its docstring says: the mean of what the noise may hide is blurred, however many steps are made."""
    assert moments("lcm", 8)[1] < -0.25
