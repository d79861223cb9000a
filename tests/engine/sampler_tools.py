"""What the tests of samplers share: a schedule, some network, the reference's loop."""

from __future__ import annotations

import dataclasses
import inspect

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.sampling.denoiser import Denoiser
from latentmill.engine.sampling.samplers import begin
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.solvers import solve

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

SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}

REFERENCES = {
    "ddim": (DDIMScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, KARRAS),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, SDE),
    "dpmpp_2m_sde_karras": (DPMSolverMultistepScheduler, {**SDE, **KARRAS}),
    "lcm": (LCMScheduler, {}),
}

SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def schedule_for(**changes) -> NoiseSchedule:
    return NoiseSchedule(SchedulerConfig.from_dict({**CONFIG, **changes}))


def original_schedule() -> NoiseSchedule:
    return NoiseSchedule(dataclasses.replace(schedule_for().config, timestep_spacing="original"))


def reference_for(sampler: str, **changes):
    kind, switches = REFERENCES[sampler]
    return kind.from_config({**CONFIG, **switches, **changes})


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    """Some smooth function of latents and time in place of a network: its values are not the point, equality is."""
    return torch.sin(x * 1.3 + t / 300) * 0.7 + 0.1 * x


class Recorder:
    """The same function as a U-Net is called, remembering what it was given."""

    def __init__(self, function=model) -> None:
        self.function = function
        self.calls: list[tuple[torch.Tensor, float]] = []

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, _context=None) -> torch.Tensor:
        t = float(timesteps.flatten()[0])
        self.calls.append((x, t))
        return self.function(x, t)


def noise_source(shape, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def no_noise() -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def sample(sampler, denoise, noise, schedule, steps, draw_noise, eta):
    return solve(begin(sampler, noise, schedule, steps, draw_noise, eta.flatten().tolist()), denoise)


def run_ours(sampler, schedule, latents, steps, function=model, draw_noise=None, eta=0.0):
    unet = Recorder(function)
    denoise = Denoiser(unet, schedule, torch.zeros(len(latents), 1, 1), None)
    draw_noise = draw_noise or noise_source(latents.shape)
    rates = torch.zeros(len(latents), 1, 1, 1) + eta
    return sample(sampler, denoise, latents, schedule, steps, draw_noise, rates), unet.calls


def run_reference(scheduler, latents, steps, function=model, **step_arguments):
    unet = Recorder(function)
    scheduler.set_timesteps(steps)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = torch.Generator().manual_seed(1)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, **step_arguments).prev_sample
    return latents, unet.calls


def assert_same_run(ours, reference) -> None:
    """The same timesteps, the same input to the network at each of them, the same result."""
    (found, calls), (expected, expected_calls) = ours, reference
    for (x, t), (expected_x, expected_t) in zip(calls, expected_calls, strict=True):
        assert abs(t - expected_t) <= 1e-3
        assert (x - expected_x).abs().max() <= 1e-4 * expected_x.abs().max()
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
