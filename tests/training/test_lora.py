"""The training of LoRAs: it leaves the model as it was, and its files load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentmill.engine import EMBEDDED_MODEL, Engine, ModelSpec
from latentmill.engine.loading.lora import check_loras
from latentmill.engine.types import LoraSpec
from training import lora

pytestmark = pytest.mark.slow


def test_a_step_of_training_makes_a_lora_and_leaves_the_model_alone(tmp_path: Path) -> None:
    engine = Engine.load(ModelSpec(model=str(EMBEDDED_MODEL), safety="none"), device="cpu", dtype="float32")
    model = engine._models
    before = {key: tensor.clone() for key, tensor in model.denoiser.state_dict().items()}
    with torch.no_grad():
        contexts = model.text.encode(["a red circle", ""]).context.clone()
    latents = torch.randn(1, model.denoiser.config.in_channels, 8, 8)
    tensors = lora.train(model, latents, contexts[:1], contexts[1:], steps=2)
    assert all(torch.equal(model.denoiser.state_dict()[key], tensor) for key, tensor in before.items())
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key), "nothing was learned"
    save_file(tensors, tmp_path / "new.safetensors")
    check_loras(
        ModelSpec(model=str(EMBEDDED_MODEL), loras=(LoraSpec(name="new", path=str(tmp_path / "new.safetensors")),))
    )
