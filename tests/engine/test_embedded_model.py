"""The model that ships: loaded by the code that loads Stable Diffusion, drawn the same by diffusers, judged right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from latentmill.engine import EMBEDDED_MODEL, Engine, GenerationRequest, ModelSpec

PROMPTS = [
    "a large red circle in the center on a white background",
    "a small yellow triangle in the center on a black background",
    "a flat icon of a panda",
    "",
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(ModelSpec(model=str(EMBEDDED_MODEL), safety="none"), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(EMBEDDED_MODEL, safety_checker=None, dtype=torch.float32)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    loaded.set_progress_bar_config(disable=True)
    # The same memory layout as ours: both are equally far from double precision, but each rounds in its own way.
    loaded.unet.to(memory_format=torch.channels_last)
    return loaded


# Over 20 steps with noise the reference differs from itself in another memory layout by almost the tolerance.
@pytest.mark.parametrize(("guidance_scale", "eta", "steps"), [(4.0, 0.0, 20), (1.0, 0.0, 20), (4.0, 0.5, 10)])
def test_latents_and_pictures_are_the_reference_pipelines(engine, pipeline, monkeypatch, guidance_scale, eta, steps):
    rows = [
        GenerationRequest(
            prompt=prompt,
            seed=seed,
            width=256,
            height=256,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]

    def reference(output_type: str):
        return pipeline(
            PROMPTS,
            generator=[torch.Generator().manual_seed(row.seed) for row in rows],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
            output_type=output_type,
        ).images

    decoded = []
    vae = engine._models.autoencoder
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda latents: (decoded.append(latents.clone()), decode(latents))[1])
    pictures = np.stack([result.pixels for result in engine.generate(rows)])

    expected = reference("latent") / vae.config.scaling_factor
    assert (torch.cat(decoded) - expected).abs().max() <= 1e-4 * expected.abs().max()
    difference = np.abs(pictures.astype(int) - (reference("np") * 255).round().astype(int))
    assert pictures.std() > 20
    assert (difference <= 2).mean() >= 0.995


@pytest.fixture(scope="module")
def rows() -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt=prompt, seed=7, width=256, height=256, num_inference_steps=20, guidance_scale=3.0)
        for prompt in PROMPTS[:2]
    ]


def test_in_bfloat16_it_draws_nearly_the_same_and_each_row_as_if_it_were_alone(engine, rows):
    half = Engine.load(
        ModelSpec(model=str(EMBEDDED_MODEL), safety="none"), device="cpu", dtype="bfloat16", batch_size=4
    )
    together, exact = half.generate(rows), engine.generate(rows)
    assert {result.precision for result in together} == {"bf16"}
    assert "bfloat16" in half.execution_class
    for row, result, wanted in zip(rows, together, exact, strict=True):
        assert not np.array_equal(result.pixels, wanted.pixels)
        assert np.abs(result.pixels.astype(int) - wanted.pixels).mean() < 1
        assert np.array_equal(half.generate([row])[0].pixels, result.pixels)


def test_it_draws_what_it_is_asked_for(engine, rows):
    red, yellow = rows
    red_circle, yellow_triangle = (result.pixels.astype(int) for result in engine.generate([red, yellow]))
    assert (red_circle[128, 128] - [215, 35, 35] < 60).all()
    assert red_circle[128, 128, 0] > 150
    assert red_circle[8, 8].min() > 200
    assert yellow_triangle[140, 128, :2].min() > 150
    assert yellow_triangle[140, 128, 2] < 110
    assert yellow_triangle[8, 8].max() < 60
