"""Stable Diffusion XL and its Turbo sibling: two text encoders, pooled text, sizes, an autoencoder kept in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from engine import Engine, EngineError, ModelSpec, describe_model
from tests.engine.families import assert_same_pictures, reference_pictures, requests, write_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


def load(folder: Path, **spec: str) -> Engine:
    return Engine.load(ModelSpec(model=str(folder), safety="none", **spec), device="cpu", dtype="float32", batch_size=4)


def pictures(engine: Engine, rows) -> np.ndarray:
    return np.stack([result.pixels for result in engine.generate(rows)])


@pytest.mark.parametrize("negative", ["", "ugly, blurred"])
@pytest.mark.parametrize("force_zeros", [True, False])
def test_pictures_equal_the_reference_pipelines(tmp_path, folder, negative, force_zeros):
    if not force_zeros:
        folder = write_sdxl(tmp_path / "encodes-empty", force_zeros=False)
    rows = requests(32, negative_prompt=negative)
    expected = reference_pictures(StableDiffusionXLPipeline.from_pretrained(folder), rows)
    assert_same_pictures(pictures(load(folder), rows), expected)


def test_an_empty_negative_prompt_means_zeros_only_in_its_own_row(folder):
    engine = load(folder)
    rows = requests(32)
    mixed = [rows[0], requests(32, negative_prompt="ugly")[1]]
    found = pictures(engine, mixed)
    assert np.array_equal(found[0], engine.generate([mixed[0]])[0].pixels)
    assert np.array_equal(found[1], engine.generate([mixed[1]])[0].pixels)


def test_turbo_draws_in_one_step_without_guidance(tmp_path):
    folder = write_sdxl(tmp_path / "turbo", spacing="trailing")
    rows = requests(32, guidance_scale=0.0, steps=1)
    expected = reference_pictures(StableDiffusionXLPipeline.from_pretrained(folder), rows)
    assert_same_pictures(pictures(load(folder), rows), expected)


def test_what_the_unet_is_given_is_what_the_reference_gives_it(folder, monkeypatch):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    engine = load(folder)
    seen = []
    forward = engine._models.unet.forward
    monkeypatch.setattr(
        engine._models.unet,
        "forward",
        lambda x, t, context, **extra: (seen.append((x, t, context, extra)), forward(x, t, context, **extra))[1],
    )
    rows = requests(32, steps=1)
    engine.generate(rows)
    latents, timesteps, context, extra = seen[0]
    expected, negative, pooled, negative_pooled = pipeline.encode_prompt([row.prompt for row in rows])
    assert torch.allclose(context, torch.cat([negative, expected]), atol=1e-4)
    assert torch.allclose(extra["pooled"], torch.cat([negative_pooled, pooled]), atol=1e-4)
    assert extra["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 8
    with torch.inference_mode():
        reference = pipeline.unet(
            latents,
            timesteps,
            context,
            added_cond_kwargs={"text_embeds": extra["pooled"], "time_ids": extra["time_ids"]},
        ).sample
        found = forward(latents, timesteps, context, **extra)
    assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_the_autoencoder_stays_in_fp32_where_the_folder_says_so(folder):
    description = describe_model(folder)
    assert description.family == "stable-diffusion-xl"
    assert description.layout.blueprint.vae.force_upcast
    assert {"text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"} <= {
        name.replace("tokenizer.json", "vocab.json") for name in description.files
    }


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("text_encoder_2/config.json", {"hidden_size": 64}, "128 wide, the U-Net's cross-attention expects 192"),
        ("text_encoder_2/config.json", {"projection_dim": 64}, "256 features, the U-Net's added embedding expects 320"),
    ],
)
def test_parts_of_two_models_are_refused(tmp_path, path, change, message):
    folder = write_sdxl(tmp_path / "model")
    config = folder / path
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(EngineError, match=message):
        describe_model(folder)
