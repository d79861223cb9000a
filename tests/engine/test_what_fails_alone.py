"""A row whose decode overflows, a retry that keeps its noise, an autoencoder whose latents are shifted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentmill.engine import Engine, GenerationRequest, ModelSpec, SafetyVerdict
from latentmill.engine.types import Pixels

ROWS = [
    GenerationRequest(prompt=f"picture {n}", seed=n, width=64, height=64, num_inference_steps=2, guidance_scale=3.0)
    for n in range(4)
]


def load(folder: Path) -> Engine:
    return Engine.load(ModelSpec(model=str(folder), safety="none"), device="cpu", dtype="float32", batch_size=4)


def rounded(folder: Path, dtype: torch.dtype) -> Engine:
    """An engine whose weights are those of bfloat16, in `dtype`, which a CPU is refused otherwise."""
    engine = load(folder)
    engine.dtype = dtype
    for network in (*engine._models.text.networks, engine._models.denoiser, engine._models.autoencoder):
        network.bfloat16().to(dtype)
    return engine


class Remembers:
    """A checker that passes all that it is shown."""

    def __init__(self) -> None:
        self.seen: list[Pixels] = []

    def check(self, pixels: Pixels) -> SafetyVerdict:
        self.seen.append(pixels)
        return SafetyVerdict(checker="test", score=0.0, flagged=False)


@pytest.mark.parametrize("poison", ["nan", "inf", "-inf"])
def test_a_decode_that_is_not_finite_fails_alone_and_is_never_shown_to_the_checker(eps_model, monkeypatch, poison):
    engine = load(eps_model)
    before = [result.pixels for result in engine.generate(ROWS)]
    vae, checker = engine._models.autoencoder, Remembers()
    decode = vae.decode

    def poisoned(latents):
        decoded = decode(latents)
        decoded[2, 1, 5, 7] = float(poison)
        return decoded

    monkeypatch.setattr(type(vae), "decode", lambda _, latents: poisoned(latents))
    monkeypatch.setattr(engine, "_safety", checker)
    results = engine.generate(ROWS)
    assert [result.status for result in results] == ["ok", "ok", "failed", "ok"]
    assert results[2].pixels is None
    assert "not finite" in results[2].error
    assert len(checker.seen) == 3
    for slot in (0, 1, 3):
        assert np.array_equal(results[slot].pixels, before[slot])


def test_a_retry_in_full_precision_keeps_the_noise_that_was_given(eps_model, monkeypatch):
    """bfloat16 on the CPU; the first pass breaks two rows, and only these are drawn again, each by its own noise."""
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(100 + n)) for n in range(4)]
    exact, half = rounded(eps_model, torch.float32), rounded(eps_model, torch.bfloat16)
    expected = [result.pixels for result in exact.generate(ROWS, noise=noise)]
    unlike = [result.pixels for result in exact.generate(ROWS)]
    decode = type(half._models.autoencoder).decode

    def overflows_in_half(vae, latents):
        decoded = decode(vae, latents)
        if latents.dtype == torch.bfloat16:
            decoded[1], decoded[3] = float("nan"), float("inf")
        return decoded

    monkeypatch.setattr(type(half._models.autoencoder), "decode", overflows_in_half)
    results = half.generate(ROWS, noise=noise)
    assert [result.precision for result in results] == ["bf16", "fp32-retry", "bf16", "fp32-retry"]
    assert [result.status for result in results] == ["ok"] * 4
    assert [result.batch_slot for result in results] == [0, 1, 2, 3]
    for slot in (1, 3):
        assert np.array_equal(results[slot].pixels, expected[slot])
        assert not np.array_equal(expected[slot], unlike[slot]), "the noise has no effect"


def test_a_first_stages_shift_is_added_after_the_division_by_its_scale(eps_model, tmp_path):
    folder = Path(shutil.copytree(eps_model, tmp_path / "model"))
    path = folder / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift_factor": 0.7}))
    engine = load(folder)
    found = np.stack([result.pixels for result in engine.generate(ROWS)]).astype(int)
    plain = np.stack([result.pixels for result in load(eps_model).generate(ROWS)]).astype(int)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        [row.prompt for row in ROWS],
        generator=[torch.Generator().manual_seed(row.seed) for row in ROWS],
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    vae = pipeline.vae
    # As the pipelines with shifted latents do it (Stable Diffusion 3, Flux); that of Stable Diffusion 1 knows no shift.
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    pictures = (expected.permute(0, 2, 3, 1).numpy() * 255).round().astype(int)
    assert np.abs(found - pictures).max() <= 1
    assert np.abs(found - plain).max() > 5, "the shift has no effect"
