"""Samplers and schedules against diffusers' schedulers, step by step, on the same predictions."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from engine.config import SchedulerConfig
from engine.denoiser import Prediction
from engine.samplers import SAMPLER_FUNCTIONS, ddim, plms
from engine.schedule import NoiseSchedule
from engine.types import SAMPLERS, EngineError

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def schedule_for(**changes) -> NoiseSchedule:
    return NoiseSchedule(SchedulerConfig.from_dict({**CONFIG, **changes}))


def model(x: torch.Tensor, t: int) -> torch.Tensor:
    """Some smooth function of latents and time in place of a network: its values are not the point, equality is."""
    return torch.sin(x * 1.3 + t / 300) * 0.7 + 0.1 * x


def denoiser_for(schedule: NoiseSchedule):
    def denoise(x: torch.Tensor, t: int) -> Prediction:
        power = schedule.alpha_cumprod(t)
        noise = model(x, t)
        return Prediction(noise, (x - (1 - power) ** 0.5 * noise) / power**0.5)

    return denoise


def run_reference(scheduler, latents, steps, **step_arguments) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        latents = scheduler.step(model(latents, int(t)), t, latents, **step_arguments).prev_sample
    return latents


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def no_noise() -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def test_the_names_offered_are_the_samplers_built():
    assert set(SAMPLERS) == set(SAMPLER_FUNCTIONS)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_forward_process_is_the_references(beta_schedule, zero_snr):
    changes = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    ours = schedule_for(**changes).alphas_cumprod
    reference = DDIMScheduler.from_config({**CONFIG, **changes}).alphas_cumprod
    assert torch.allclose(ours, reference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 30, 50, 333, 999])
def test_timesteps_are_the_references(spacing, steps):
    reference = DDIMScheduler.from_config({**CONFIG, "timestep_spacing": spacing})
    reference.set_timesteps(steps)
    assert [t for t, _ in schedule_for(timestep_spacing=spacing).steps(steps)] == reference.timesteps.tolist()


@pytest.mark.parametrize(
    ("steps", "message"), [(0, "takes 1 to 1000"), (1001, "takes 1 to 1000"), (1000, "take 999 or fewer")]
)
def test_step_counts_outside_the_schedule_are_refused(steps, message):
    with pytest.raises(EngineError, match=message):
        schedule_for().steps(steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 20, 30])
def test_ddim_follows_the_reference(spacing, steps):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = schedule_for(timestep_spacing=spacing)
    reference = run_reference(DDIMScheduler.from_config({**CONFIG, "timestep_spacing": spacing}), latents, steps)
    found = ddim(denoiser_for(schedule), latents, schedule, steps, column(0, 0, 0), no_noise)
    assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_ddim_with_eta_uses_each_rows_own_noise_and_leaves_the_others_alone():
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = schedule_for()
    noises = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5 + step)) for step in range(10)]
    pending = iter(noises)
    mixed = ddim(denoiser_for(schedule), latents, schedule, 10, column(0.8, 0.0), lambda: next(pending))
    alone = ddim(denoiser_for(schedule), latents, schedule, 10, column(0.0, 0.0), no_noise)
    assert torch.equal(mixed[1], alone[1])

    reference = DDIMScheduler.from_config(CONFIG)
    reference.set_timesteps(10)
    expected = latents
    for t, noise in zip(reference.timesteps, noises, strict=True):
        expected = reference.step(model(expected, int(t)), t, expected, eta=0.8, variance_noise=noise).prev_sample
    assert (mixed[0] - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()


def test_ddim_clips_the_predicted_data_where_the_config_says_so():
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    changes = {"clip_sample": True, "clip_sample_range": 0.5}
    schedule = schedule_for(**changes)
    reference = run_reference(DDIMScheduler.from_config({**CONFIG, **changes}), latents, 10)
    found = ddim(denoiser_for(schedule), latents, schedule, 10, column(0, 0), no_noise)
    assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20, 50])
def test_plms_follows_the_reference(spacing, steps):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = {**CONFIG, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": spacing}
    schedule = schedule_for(timestep_spacing=spacing)
    reference = run_reference(PNDMScheduler.from_config(config), latents, steps)
    found = plms(denoiser_for(schedule), latents, schedule, steps, column(0, 0, 0), no_noise)
    assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_plms_refuses_eta():
    schedule = schedule_for()
    with pytest.raises(ValueError, match="eta must be 0 for PLMS"):
        plms(denoiser_for(schedule), torch.zeros(2, 4, 8, 8), schedule, 5, column(0, 0.1), no_noise)
