"""Fine-tunes: the shipped model stays as it was, and what is written is a model of its own that draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentmill.engine import EMBEDDED_MODEL, Engine, GenerationRequest, ModelSpec, describe_model
from training import finetune
from training.styles import LOOKS, Lessons

pytestmark = pytest.mark.long


def test_two_steps_make_a_folder_of_another_model_and_leave_the_shipped_one_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("training.styles.PROMPTS", tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a large red circle in the center on a white background\n")
    monkeypatch.setattr("training.styles.STEPS", 1)
    monkeypatch.setattr("training.styles.DRAWN", 1)
    lessons = Lessons.prepare(scene_count=1)
    assert len(lessons.pictures) == len(lessons.contexts) == 2
    before = {key: tensor.clone() for key, tensor in lessons.model.denoiser.state_dict().items()}
    latents = lessons.latents(LOOKS["night"])
    unet = finetune.train(lessons.model, latents, lessons.contexts, lessons.empty, steps=2)
    assert all(torch.equal(lessons.model.denoiser.state_dict()[key], tensor) for key, tensor in before.items())
    assert any(not torch.equal(unet[key], tensor) for key, tensor in before.items()), "nothing was learned"

    folder = finetune.write(tmp_path / "night", unet)
    assert not (folder / "README.md").exists(), "the card speaks of the shipped weights"
    shipped, made = describe_model(EMBEDDED_MODEL), describe_model(folder)
    differ = {name for name in shipped.files if shipped.files[name] != made.files.get(name)}
    assert differ == {"unet/diffusion_pytorch_model.safetensors"}
    engine = Engine.load(ModelSpec(model=str(folder), safety="none"), device="cpu", dtype="float32")
    request = GenerationRequest(prompt="a red circle", seed=1, width=64, height=64, num_inference_steps=1)
    (drawn,) = engine.generate([request])
    assert drawn.pixels is not None
