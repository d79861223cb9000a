"""Stable Diffusion XL and its Turbo sibling: two text encoders, pooled text, sizes, an autoencoder kept in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model
from tests.engine.families import (
    assert_same_pictures,
    assert_same_unet,
    reference_pictures,
    requests,
    write_sd2,
    write_sdxl,
)


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


def test_pooled_text_moves_into_a_slot_with_its_row(folder):
    engine = load(folder)
    rows = [row for steps in (2, 4, 3) for row in requests(32, steps=steps, negative_prompt="ugly" * (steps == 3))]
    assert len(rows) > engine.batch_size
    for row, picture in zip(rows, pictures(engine, rows), strict=True):
        assert np.array_equal(engine.generate([row])[0].pixels, picture)


# diffusers' Euler converts a tensor by a protocol that numpy 2 has deprecated.
theirs = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SAMPLERS = {"euler": EulerDiscreteScheduler, "euler_a": EulerAncestralDiscreteScheduler}


@theirs
def test_the_base_models_own_sampler_draws_the_same(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    rows = requests(32, sampler="euler")
    assert_same_pictures(pictures(load(folder), rows), reference_pictures(pipeline, rows))


@theirs
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["sd-turbo", "sdxl-turbo"])
def test_turbo_draws_in_few_steps_without_guidance(tmp_path_factory, family, sampler, steps):
    folder = tmp_path_factory.getbasetemp() / family
    if not folder.exists():
        writers = {"sd-turbo": lambda path: write_sd2(path, "epsilon"), "sdxl-turbo": write_sdxl}
        writers[family](folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = SAMPLERS[sampler].from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    rows = requests(32, guidance_scale=0.0, steps=steps, sampler=sampler)
    expected = reference_pictures(pipeline, rows)
    assert_same_pictures(pictures(load(folder, timestep_spacing="trailing"), rows), expected)


def test_what_the_unet_is_given_is_what_the_reference_gives_it(folder, monkeypatch):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    engine = load(folder)
    seen = []
    forward = engine._models.denoiser.forward
    monkeypatch.setattr(
        engine._models.denoiser,
        "forward",
        lambda x, t, context, **extra: (seen.append((x, t, context, extra)), forward(x, t, context, **extra))[1],
    )
    rows = requests(32, steps=1)
    engine.generate(rows)
    _, _, context, extra = seen[0]
    expected, negative, pooled, negative_pooled = pipeline.encode_prompt([row.prompt for row in rows])
    assert torch.allclose(context, torch.cat([negative, expected]), atol=1e-4)
    assert torch.allclose(extra["pooled"], torch.cat([negative_pooled, pooled]), atol=1e-4)
    assert extra["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 8
    assert_same_unet(engine, pipeline)


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
        ("text_encoder_2/config.json", {"hidden_size": 64}, "128 wide, the denoiser's attention expects 192"),
        ("text_encoder_2/config.json", {"projection_dim": 64}, "64 features, the denoiser expects 128"),
    ],
)
def test_parts_of_two_models_are_refused(tmp_path, path, change, message):
    folder = write_sdxl(tmp_path / "model")
    config = folder / path
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(EngineError, match=message):
        describe_model(folder)
