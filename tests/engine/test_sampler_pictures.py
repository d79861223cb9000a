"""Every sampler through the engine: diffusers' pictures, and bits that depend on nothing but the request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentmill.engine import SAMPLERS, Engine, GenerationRequest, ModelSpec
from tests.engine.sampler_tools import REFERENCES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

STOCHASTIC = ["euler_a", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm"]


def request(prompt: str, seed: int, sampler: str, **changes) -> GenerationRequest:
    values = {"width": 64, "height": 48, "num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "ugly"}
    return GenerationRequest(**{"prompt": prompt, "seed": seed, "sampler": sampler, **values, **changes})


@pytest.fixture(scope="module")
def pipeline(eps_model):
    pipeline = StableDiffusionPipeline.from_pretrained(eps_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_pictures(pipeline, requests: list[GenerationRequest]) -> np.ndarray:
    kind, switches = REFERENCES[requests[0].sampler]
    folders_own = pipeline.scheduler
    try:
        pipeline.scheduler = kind.from_config(folders_own.config, **switches)
        pictures = pipeline(
            [row.prompt for row in requests],
            negative_prompt=[row.negative_prompt for row in requests],
            generator=[torch.Generator().manual_seed(row.seed) for row in requests],
            width=requests[0].width,
            height=requests[0].height,
            num_inference_steps=requests[0].num_inference_steps,
            guidance_scale=requests[0].guidance_scale,
            output_type="np",
        ).images
    finally:
        pipeline.scheduler = folders_own
    return (pictures * 255).round().astype(int)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_the_reference_pipelines(sampler, engine, pipeline):
    requests = [request(prompt, seed, sampler) for seed, prompt in enumerate(["a red cat", "", "two dogs", "x " * 90])]
    expected = reference_pictures(pipeline, requests)
    found = np.stack([result.pixels for result in engine.generate(requests)]).astype(int)
    assert expected.std() > 5, "a flat picture proves nothing"
    assert (np.abs(found - expected) <= 1).mean() >= 0.999


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bits_do_not_depend_on_neighbours(sampler, engine):
    row = request("the row in question", 7, sampler)
    others = [request(f"neighbour {number}", number, sampler, guidance_scale=2.0 + number) for number in range(4)]
    alone = engine.generate([row])[0].pixels
    for slot in (2, 4):  # in the midst of a full batch; alone in a padded one
        assert np.array_equal(engine.generate([*others[:slot], row, *others[slot:]])[slot].pixels, alone)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_noise_put_in_is_the_samples_own(sampler, engine):
    first, second = engine.generate([request("a red cat", seed, sampler) for seed in (1, 2)])
    again = engine.generate([request("a red cat", 2, sampler)])[0]
    assert not np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(again.pixels, second.pixels)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_eta_is_refused_by_name(sampler, engine):
    result = engine.generate([request("a red cat", 1, sampler, eta=0.5)])[0]
    assert result.error == f"eta is 0.5; it must be 0 for {sampler}: it is ddim's"


def test_steps_that_do_not_fit_fail_alone_with_the_nearest(engine):
    good, bad = engine.generate([request("a", 1, "lcm", num_inference_steps=steps) for steps in (2, 51)])
    assert good.status == "ok"
    assert bad.error.endswith("the nearest number that does is 50")


def test_the_original_spacing_is_asked_for_by_name(eps_model):
    spec = ModelSpec(model=str(eps_model), safety="none", timestep_spacing="original")
    original = Engine.load(spec, device="cpu", dtype="float32", batch_size=1)
    seen = []
    unet = original._models.denoiser
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    refused, made = original.generate(
        [request("a", 1, "ddim", num_inference_steps=steps, guidance_scale=1.0) for steps in (9, 30)]
    )
    assert refused.error.endswith("the nearest number that does is 8")
    assert made.status == "ok"
    assert seen == [33.0 * k + 1 for k in reversed(range(31))]
