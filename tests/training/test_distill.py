"""The distillation: its consistency function, its teacher, and a LoRA that loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from latentmill.engine import EMBEDDED_MODEL, Engine, ModelSpec
from latentmill.engine.loading.lora import check_loras
from latentmill.engine.sampling.levels import PLACEMENTS
from latentmill.engine.types import LoraSpec
from training import distill, judge, lora, scenes
from training.drawing import Settings
from training.styles import Lessons

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lessons():
    engine = Engine.load(ModelSpec(model=str(EMBEDDED_MODEL), safety="none"), device="cpu", dtype="float32")
    model = engine._models
    with torch.no_grad():
        contexts = model.text.encode(["a red circle", "a blue square", ""]).context.clone()
    return Lessons(model=model, pictures=[], contexts=contexts[:2], empty=contexts[2:])


@pytest.fixture
def distillation(lessons):
    torch.manual_seed(0)
    latents = torch.randn(2, lessons.model.denoiser.config.in_channels, 8, 8)
    return distill.Distillation(lessons.model.denoiser, lessons.model.schedule, lessons, latents)


@torch.no_grad()
def test_without_noise_the_student_tells_what_it_is_shown_and_with_it_x0(distillation, lessons):
    noisy, context = torch.randn(2, 8, 8, 8), lessons.contexts
    clean, last = torch.full((2,), -1), torch.full((2,), 999)
    assert torch.equal(distillation.consistent(noisy, clean, context), noisy)
    velocity = lessons.model.denoiser(noisy, last, context)
    x0, _ = distillation.split(velocity, noisy, last)
    torch.testing.assert_close(distillation.consistent(noisy, last, context), x0, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_splitting_a_true_velocity_gives_x0_and_noise(distillation):
    clean, noise, here = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8), torch.tensor([19, 739])
    noisy = distillation.schedule.add_noise(clean, noise, here)
    share = distillation.alpha_bar(here)
    found = distillation.split(share.sqrt() * noise - (1 - share).sqrt() * clean, noisy, here)
    torch.testing.assert_close(found, (clean, noise), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_teacher_that_is_right_leads_along_the_same_noise(distillation, lessons, monkeypatch):
    clean, noise, here = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8), torch.tensor([19, 739])
    share = distillation.alpha_bar(here)
    velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
    monkeypatch.setattr(distillation, "teacher", lambda noisy, timesteps, context: velocity.repeat(2, 1, 1, 1))
    noisy, following = distillation.schedule.add_noise(clean, noise, here), here - 20
    found = distillation.taught(noisy, here, following, lessons.contexts)
    torch.testing.assert_close(found[0], clean[0], rtol=1e-3, atol=1e-3)
    wanted = distillation.schedule.add_noise(clean, noise, following.clamp(min=0))
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-3)


def test_the_teachers_timesteps_are_those_that_the_sampler_takes(distillation, lessons):
    sampled = {step.here.timestep for step in PLACEMENTS["distilled"].place(lessons.model.schedule, 4).steps}
    assert sampled <= set(range(distillation.stride - 1, 1000, distillation.stride))


def test_a_step_makes_a_lora_of_every_layer_and_leaves_the_model_alone(distillation, lessons, tmp_path: Path):
    unet = lessons.model.denoiser
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    with torch.enable_grad():
        tensors = lora.learn(unet, distillation, 2, distill.RATE, 2, distill.LAYERS)
    assert all(torch.equal(unet.state_dict()[key], tensor) for key, tensor in before.items())
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key), "nothing was learned"
    lora.write(tensors, tmp_path / "new.safetensors")
    check_loras(
        ModelSpec(model=str(EMBEDDED_MODEL), loras=(LoraSpec(name="new", path=str(tmp_path / "new.safetensors")),))
    )


def test_with_the_lora_that_ships_four_steps_without_guidance_draw_what_is_asked_for():
    assert distill.FILE.stat().st_size < 2_500_000
    wanted = scenes.draw_scenes(scenes.split(held_out=True), 8, np.random.default_rng(4))
    settings = Settings(steps=4, sampler="lcm", guidance=1.0, device="cpu", loras={"lcm": distill.FILE})
    drawn = settings.draw(settings.load(EMBEDDED_MODEL), [scenes.caption(scene) for scene in wanted], first_seed=1)
    right = [all(judge.look(picture).agrees(scene).values()) for picture, scene in zip(drawn, wanted, strict=True)]
    assert sum(right) >= 7
