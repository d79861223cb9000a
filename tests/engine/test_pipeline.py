"""The engine end to end: equal to diffusers' pipeline, and a row's bits depend on its request alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec, SafetyVerdict
from tests.harness.models import write_model

PROMPTS = ["a red cat", "two dogs on a hill", "", "ünïcode ✨ " * 30]


def request(prompt: str = "a red cat", **changes) -> GenerationRequest:
    values = {
        "negative_prompt": "",
        "seed": 7,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
    }
    return GenerationRequest(**{"prompt": prompt, **values, **changes})


def load(folder: Path, batch_size: int = 4) -> Engine:
    return Engine.load(
        ModelSpec(model=str(folder), safety="none"), device="cpu", dtype="float32", batch_size=batch_size
    )


def reference_pictures(folder: Path, requests: list[GenerationRequest], scheduler_class=DDIMScheduler) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    first = requests[0]
    pictures = pipeline(
        [row.prompt for row in requests],
        negative_prompt=[row.negative_prompt for row in requests],
        generator=[torch.Generator().manual_seed(row.seed) for row in requests],
        width=first.width,
        height=first.height,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        eta=first.eta,
        output_type="np",
    ).images
    return (pictures * 255).round().astype(np.uint8)


FOLDERS = {
    "sd1": {},
    "five-levels-f16": {
        "unet_channels": (8, 16, 16),
        "vae_channels": (4, 8, 8, 8, 8),
        "latent_channels": 8,
        "context_dim": 16,
    },
    "wide-heads": {"unet_channels": (32, 64), "heads": [2, 8], "context_dim": 48},
    "v-linear": {
        "prediction_type": "v_prediction",
        "unet": {"use_linear_projection": True, "upcast_attention": True},
        "scheduler": {"timestep_spacing": "trailing", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    },
    "x0": {"prediction_type": "sample", "scheduler": {"set_alpha_to_one": True, "timestep_spacing": "linspace"}},
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(("guidance_scale", "eta"), [(5.0, 0.0), (1.0, 0.0), (3.0, 0.6)])
def test_pictures_equal_the_reference_pipelines(name, guidance_scale, eta, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"reference-{name}"
    if not folder.exists():
        write_model(folder, **FOLDERS[name])
    engine = load(folder)
    side = engine.description.factor * 8
    requests = [
        request(
            prompt,
            seed=seed,
            negative_prompt="ugly",
            width=2 * side,
            height=side,
            num_inference_steps=10,
            guidance_scale=guidance_scale,
            eta=eta,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    expected = reference_pictures(folder, requests)
    found = np.stack([result.pixels for result in engine.generate(requests)])
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert expected.std() > 5, "a flat picture proves nothing"
    assert (difference <= 2).mean() >= 0.995
    assert difference.max() <= 2


def test_plms_pictures_equal_the_reference_pipelines(eps_model, engine):
    requests = [
        request(prompt, seed=seed, sampler="plms", num_inference_steps=10) for seed, prompt in enumerate(PROMPTS)
    ]
    expected = reference_pictures(eps_model, requests, PNDMScheduler)
    found = np.stack([result.pixels for result in engine.generate(requests)])
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def test_rows_of_one_batch_keep_their_own_guidance_and_eta(engine):
    rows = [request(guidance_scale=2.0), request(guidance_scale=9.0), request(guidance_scale=2.0, eta=1.0)]
    together = [result.pixels for result in engine.generate(rows)]
    for row, picture in zip(rows, together, strict=True):
        assert np.array_equal(engine.generate([row])[0].pixels, picture)
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together[0], together[2])


def test_a_rows_bits_do_not_depend_on_neighbours_slot_or_padding(engine):
    row = request("the row in question", seed=2**32 - 1, eta=0.5)
    alone = engine.generate([row])[0].pixels
    others = [
        request(f"neighbour {number}", seed=number, guidance_scale=3 + number, eta=number / 10) for number in range(9)
    ]
    for slot in (0, 1, 3, 5, 9):
        results = engine.generate([*others[:slot], row, *others[slot:]])
        assert np.array_equal(results[slot].pixels, alone)
        assert (results[slot].batch_slot, results[slot].batch_size) == (slot % 4, 4)


def test_order_is_kept_across_shapes(engine):
    rows = [
        request(seed=number, width=64 if number % 2 else 96, num_inference_steps=2 + number % 3) for number in range(9)
    ]
    results = engine.generate(rows)
    assert [result.pixels.shape for result in results] == [(row.height, row.width, 3) for row in rows]
    for row, result in zip(rows, results, strict=True):
        assert np.array_equal(result.pixels, engine.generate([row])[0].pixels)


def test_no_guidance_skips_the_negative_pass(engine, monkeypatch):
    sizes = []
    unet = engine._models.denoiser
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda x, *rest, **more: (sizes.append(len(x)), forward(x, *rest, **more))[1])
    engine.generate([request(guidance_scale=1.0)])
    engine.generate([request(guidance_scale=1.01)])
    assert sizes == [4] * 4 + [8] * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 65}, "not a multiple of 8"),
        ({"seed": 2**32}, "outside 0..4294967295"),
        ({"sampler": "ancient"}, "'ancient' is not one of ddim, plms"),
        ({"sampler": "plms", "eta": 0.5}, "must be 0 for plms"),
        ({"num_inference_steps": 1001}, "takes 1 to 1000"),
        ({"prompt": "a lone \ud800 surrogate"}, "Error"),
    ],
)
def test_a_bad_request_fails_alone(engine, changes, reason):
    good = request(seed=3)
    results = engine.generate([good, dataclasses.replace(good, **changes), good])
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert reason in results[1].error
    assert results[1].pixels is None


def test_latents_that_are_not_finite_fail_alone_and_are_never_shown_to_the_checker(eps_model, monkeypatch):
    engine = load(eps_model)
    unet = engine._models.denoiser
    forward = unet.forward

    def poisoned(x, *rest, **more):
        output = forward(x, *rest, **more)
        output[1] = float("nan")
        return output

    monkeypatch.setattr(unet, "forward", poisoned)
    seen = []

    class Checker:
        def check(self, pixels):
            seen.append(pixels)
            return SafetyVerdict(checker="test", score=0.0, flagged=False)

    monkeypatch.setattr(engine, "_safety", Checker())
    results = engine.generate([request(seed=number, guidance_scale=1.0) for number in range(4)])
    assert [result.status for result in results] == ["ok", "failed", "ok", "ok"]
    assert "not finite" in results[1].error
    assert len(seen) == 3


class Raises:
    def check(self, pixels):
        raise RuntimeError("weights are gone")


class Mute:
    def check(self, pixels):
        return None


@pytest.mark.parametrize(("checker", "reason"), [(Raises(), "weights are gone"), (Mute(), "no verdict")])
def test_safety_fails_closed(eps_model, monkeypatch, checker, reason):
    engine = load(eps_model)
    monkeypatch.setattr(engine, "_safety", checker)
    result = engine.generate([request()])[0]
    assert result.status == "failed"
    assert result.pixels is None
    assert reason in result.error


def test_prompt_tokens_are_counted_before_truncation(engine):
    short, long = engine.generate([request("abc"), request("abc " * 60)])
    assert short.prompt_tokens == 3
    assert long.prompt_tokens == 180


def test_float16_on_a_cpu_is_refused_with_the_remedy(eps_model):
    with pytest.raises(EngineError, match="use float32 or bfloat16, or a GPU"):
        Engine.load(ModelSpec(model=str(eps_model)), device="cpu", dtype="float16")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_kind_of_device_that_was_never_tried_is_refused(eps_model, device):
    with pytest.raises(EngineError, match=f"device is '{device}'; the engine runs on cpu, cuda or cuda:N"):
        Engine.load(ModelSpec(model=str(eps_model)), device=device)


def test_a_cuda_device_beyond_the_last_is_refused(eps_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineError, match="device is 'cuda:99', but this machine has 2, counted from cuda:0"):
        Engine.load(ModelSpec(model=str(eps_model)), device="cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused(eps_model):
    with pytest.raises(EngineError, match="sees no CUDA device; use cpu"):
        Engine.load(ModelSpec(model=str(eps_model)), device="cuda")


def test_the_execution_class_names_what_the_bits_depend_on(engine):
    assert engine.execution_class.endswith(f"1 threads, float32, torch {torch.__version__}, batch 4, channels last")
