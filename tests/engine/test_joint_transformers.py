"""Stable Diffusion 3, 3.5 and Flux: drawn as the reference draws them, each row by its request alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec, describe_model, load_tokenizer
from latentmill.engine.latent_diffusion import LatentDiffusion, load_latent_diffusion
from latentmill.engine.loading.layout import find_model
from tests.engine.diffusers_models import SCHNELL_SCHEDULER, in_shards, write_flux, write_sd3
from tests.engine.families import assert_same_pictures, requests

# diffusers' schedulers make arrays of tensors in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BATCH = 4
DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd3": write_sd3,
    "sd3 without T5": lambda folder: write_sd3(folder, has_t5=False),
    "sd35-large": lambda folder: write_sd3(folder, qk_norm="rms_norm"),
    "sd35-medium": lambda folder: write_sd3(folder, **DUAL),
    "flux-dev": write_flux,
    "flux-schnell": lambda folder: write_flux(folder, distilled=False, **SCHNELL_SCHEDULER),
}
DISTILLED = ("flux-dev",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transformers")
    return {name: write(root / name) for name, write in WRITERS.items()}


def load(folder: Path, batch_size: int = BATCH, **spec: Any) -> Engine:
    return Engine.load(
        ModelSpec(model=str(folder), **{"safety": "none", **spec}), device="cpu", dtype="float32", batch_size=batch_size
    )


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    return {name: load(folder) for name, folder in folders.items()}


def rows_for(name: str, **changes: Any) -> list[GenerationRequest]:
    rows = requests(32, **{"guidance_scale": 3.5, "sampler": "euler", "steps": 3, **changes})
    if name in DISTILLED:
        return rows
    return [dataclasses.replace(row, negative_prompt="ugly" * (row.seed % 2)) for row in rows]


def reference(
    folder: Path,
    rows: list[GenerationRequest],
    sampler: str = "euler",
    change: Callable[[DiffusionPipeline], None] = lambda _: None,
) -> np.ndarray:
    """The library's pipeline of the folder, called as its documentation says; `change` is made of it before."""
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if "without" in folder.name else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    change(pipeline)
    if sampler == "dpmpp_2m":
        shift = pipeline.scheduler.config.shift
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
        )
    first = rows[0]
    guidance: dict[str, Any] = {"guidance_scale": first.guidance_scale}
    if "schnell" in folder.name:
        # As its authors do; the library's default is what they do for dev.
        guidance = {"true_cfg_scale": first.guidance_scale, "max_sequence_length": 256}
    if any(row.negative_prompt for row in rows):
        guidance["negative_prompt"] = [row.negative_prompt for row in rows]
    pictures = pipeline(
        [row.prompt for row in rows],
        width=first.width,
        height=first.height,
        num_inference_steps=first.num_inference_steps,
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        output_type="np",
        **guidance,
    ).images
    return (pictures * 255).round().astype(np.uint8)


def pictures(engine: Engine, rows: list[GenerationRequest]) -> np.ndarray:
    results = engine.generate(rows)
    assert [result.error for result in results] == [None] * len(rows)
    return np.stack([result.pixels for result in results])


@pytest.mark.parametrize(
    ("name", "guidance_scale"), [*((name, 3.5) for name in WRITERS), ("sd3", 1.0), ("flux-schnell", 1.0)]
)
def test_pictures_equal_the_reference_pipelines(folders, engines, name, guidance_scale):
    rows = rows_for(name, guidance_scale=guidance_scale)
    assert_same_pictures(pictures(engines[name], rows), reference(folders[name], rows))


# The library's pipeline of schnell gives that scheduler a shift which it refuses.
@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_the_solver_draws_what_the_references_solver_draws(folders, engines, name):
    rows = rows_for(name, sampler="dpmpp_2m", steps=6)
    assert_same_pictures(pictures(engines[name], rows), reference(folders[name], rows, "dpmpp_2m"))


def mixed_rows(name: str) -> list[GenerationRequest]:
    """Both samplers at several numbers of steps, guidance and negative prompts of their own, in no order."""
    loops = [("euler", 1, 2.0), ("euler", 3, 6.5), ("dpmpp_2m", 2, 2.0), ("dpmpp_2m", 4, 6.5), ("euler", 2, 1.0)]
    rows = [
        GenerationRequest(
            prompt=f"a dog, number {number}",
            negative_prompt="" if name in DISTILLED else "ugly" * (number % 2),
            seed=number,
            width=64,
            height=32,
            sampler=sampler,
            num_inference_steps=steps,
            guidance_scale=scale,
        )
        for number, (sampler, steps, scale) in enumerate([*loops, loops[1]])
    ]
    random.Random(3).shuffle(rows)
    return rows


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev"])
def test_rows_have_the_same_bits_mixed_and_apart(folders, name):
    engine, rows = load(folders[name], batch_size=2), mixed_rows(name)
    apart = [pictures(engine, [row])[0] for row in rows]
    assert len({picture.tobytes() for picture in apart}) == len(rows)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    results = engine.generate([rows[place] for place in order])
    for place, result in zip(order, results, strict=True):
        assert np.array_equal(result.pixels, apart[place]), rows[place]
    assert {result.batch_slot for result in results} == {0, 1}


def test_distilled_guidance_is_an_input_and_costs_no_second_pass(engines, monkeypatch):
    seen = []
    network = engines["flux-dev"]._models.denoiser
    forward = network.forward

    def watched(x: torch.Tensor, *rest: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        seen.append((len(x), conditions["guidance"].tolist()))
        return forward(x, *rest, **conditions)

    monkeypatch.setattr(network, "forward", watched)
    rows = [
        dataclasses.replace(row, guidance_scale=scale)
        for row, scale in zip(rows_for("flux-dev"), (2, 5, 2, 7), strict=True)
    ]
    engines["flux-dev"].generate(rows)
    assert seen == [(BATCH, [2.0, 5.0, 2.0, 7.0])] * 3


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("sd3", {"width": 72}, "not a multiple of 16"),
        ("sd3", {"width": 288}, "has a side of more than 256"),
        ("sd3", {"sampler": "ddim"}, "'ddim' is not one of euler, dpmpp_2m"),
        ("sd3", {"eta": 0.5}, "must be 0 for euler"),
        ("sd3", {"num_inference_steps": 1001}, "takes 1 to 1000"),
        ("flux-dev", {"negative_prompt": "ugly"}, "distilled for guidance: it takes no negative prompt"),
        ("flux-dev", {"height": 40}, "not a multiple of 16"),
        ("flux-schnell", {"prompt": "a lone \ud800 surrogate"}, "Error"),
    ],
)
def test_a_bad_request_fails_alone(engines, name, changes, reason):
    good = rows_for(name, steps=1)[0]
    results = engines[name].generate([good, dataclasses.replace(good, **changes), good])
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert reason in results[1].error


def test_latents_that_are_not_finite_fail_alone(engines, monkeypatch):
    engine = engines["flux-dev"]
    network = engine._models.denoiser
    forward = network.forward
    sound = pictures(engine, rows_for("flux-dev"))

    def poisoned(x: torch.Tensor, *rest: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        output = forward(x, *rest, **conditions)
        output[1] = float("nan")
        return output

    monkeypatch.setattr(network, "forward", poisoned)
    results = engine.generate(rows_for("flux-dev"))
    assert [result.status for result in results] == ["ok", "failed", "ok", "ok"]
    assert "not finite" in str(results[1].error)
    for place in (0, 2, 3):
        assert np.array_equal(results[place].pixels, sound[place])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev"])
def test_half_precision_draws_nearly_the_same_and_is_widened_for_a_retry(folders, name, dtype):
    spec, rows = ModelSpec(model=str(folders[name])), rows_for(name, steps=2)[:2]
    layout = find_model(spec)

    def drawn(models: LatentDiffusion) -> torch.Tensor:
        with torch.inference_mode():
            (part,) = models.sample(rows, 2)
        assert part.finite.all()
        return part.pictures

    half = load_latent_diffusion(layout, spec, dtype, torch.device("cpu"), 2)
    assert {parameter.dtype for parameter in half.denoiser.parameters()} == {dtype}
    whole = drawn(load_latent_diffusion(layout, spec, torch.float32, torch.device("cpu"), 2))
    assert (drawn(half) - whole).abs().mean() < 0.01
    with half.in_fp32() as wide:
        assert (drawn(wide) - whole).abs().mean() < 0.01
    assert {parameter.dtype for network in half.text.networks for parameter in network.parameters()} == {dtype}


def test_what_is_described_is_what_the_files_say(folders):
    found = describe_model(folders["sd3"])
    assert (found.family, found.factor, found.max_side) == ("stable-diffusion-3", 16, 256)
    assert (found.prediction_type, found.timestep_spacing) == ("flow", "linspace")
    assert found.samplers == ("euler", "dpmpp_2m")
    assert {"text_encoder_3/model.safetensors", "tokenizer_3/tokenizer.json"} <= set(found.files)
    dev, schnell = describe_model(folders["flux-dev"]), describe_model(folders["flux-schnell"])
    assert (dev.family, dev.default_size, dev.timestep_spacing) == ("flux", (1024, 1024), "trailing")
    for described, tokens in (
        (found, 255),
        (dev, 511),
        (schnell, 255),
        (describe_model(folders["sd3 without T5"]), 75),
    ):
        assert described.max_tokens == tokens + 2
        assert described.layout.blueprint.prompt_tokens == tokens


def test_a_long_prompt_is_read_by_t5_and_counted_by_it(folders, engines):
    texts = ["a" * 100, "a" * 100 + "b", "c" * 255, "c" * 255 + "d"]
    assert load_tokenizer(folders["sd3"]).count(texts) == [101, 102, 256, 257]
    states = engines["sd3"]._models.text.encode(texts).context
    assert not torch.equal(states[0], states[1]), "T5 reads on where CLIP has stopped"
    assert torch.equal(states[2], states[3])
    strict = load(folders["sd3"], long_prompts="error")
    rows = [dataclasses.replace(rows_for("sd3")[0], prompt=text) for text in ("c" * 254, "c" * 255)]
    results = strict.generate(rows)
    assert results[0].error is None
    assert results[1].error == "the prompt has 256 tokens, the limit is 255; shorten it"


@pytest.mark.parametrize("changes", [{"prompt_syntax": "a1111"}, {"long_prompts": "chunk"}])
def test_weights_and_chunks_are_refused_before_anything_is_loaded(folders, changes):
    with pytest.raises(EngineError, match="of flux take no weights and no chunks; use plain, and truncate or error"):
        load(folders["flux-dev"], **changes)


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_shards_are_read_as_one_file(folders, tmp_path, name):
    rows = rows_for(name, steps=2)
    expected = pictures(load(folders[name]), rows)
    folder = in_shards(folders[name], tmp_path / "sharded")
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    assert index.is_file()
    found = describe_model(folder)
    shards = sorted(path.name for path in index.parent.glob("*.safetensors"))
    assert len(shards) > 1
    assert {f"transformer/{shard}" for shard in shards} | {f"transformer/{index.name}"} <= set(found.files)
    assert np.array_equal(pictures(load(folder), rows), expected)


def test_a_shard_that_is_missing_or_holds_too_much_is_named(folders, tmp_path):
    folder = in_shards(folders["sd3"], tmp_path / "sharded")
    first, second, *_ = sorted((folder / "transformer").glob("*.safetensors"))
    weights = load_file(second)
    save_file({**weights, **dict(list(load_file(first).items())[:1])}, second)
    with pytest.raises(EngineError, match="two of its shards hold"):
        load(folder)
    second.unlink()
    with pytest.raises(EngineError, match=f"transformer lacks {second.name}, which .*index.json names"):
        describe_model(folder)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace(second.name, "../outside.safetensors"))
    with pytest.raises(EngineError, match=r"names '\.\./outside\.safetensors': shards are"):
        describe_model(folder)
