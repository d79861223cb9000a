"""Pipelines that the engine does not know itself, run by the library diffusers behind the engine's own contract."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from latentmill.engine import (
    Engine,
    EngineError,
    GenerationRequest,
    ModelSpec,
    SafetyVerdict,
    describe_model,
    load_tokenizer,
)
from latentmill.engine.diffusers_backend.folder import find_pipeline
from latentmill.engine.diffusers_backend.pipeline import load_pipeline
from latentmill.engine.families import table
from tests.engine.diffusers_models import WRITERS, write_flux

BATCH = 3

# diffusers' schedulers make arrays of tensors in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def request(prompt: str = "a red cat", **changes: Any) -> GenerationRequest:
    small: dict[str, Any] = {"width": 64, "height": 48, "num_inference_steps": 2, "guidance_scale": 3.0}
    return GenerationRequest(prompt=prompt, **{**small, "sampler": "default", **changes})


def load(folder: Path, **changes: Any) -> Engine:
    spec = ModelSpec(model=str(folder), **{"safety": "none", **changes})
    return Engine.load(spec, device="cpu", dtype="float32", batch_size=BATCH)


@pytest.fixture(scope="module", autouse=True)
def foreign() -> Iterator[None]:
    """Flux and Stable Diffusion 3 as if the engine did not run them itself: the library's other pipelines are alike."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FluxPipeline", "StableDiffusion3Pipeline"):
            patch.delitem(table.PIPELINES, name, raising=False)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("pipelines") / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def undistilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("pipelines") / "undistilled", distilled=False)


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Stable Diffusion 3, to be broken."""
    return Path(shutil.copytree(folders["sd3"], tmp_path / "sd3"))


def direct(folder: Path, rows: list[GenerationRequest], **arguments: Any) -> list[np.ndarray]:
    """What the library draws for a whole batch when it is called as its documentation says."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    first = rows[0]
    pictures = pipeline(
        prompt=[row.prompt for row in rows],
        width=first.width,
        height=first.height,
        num_inference_steps=first.num_inference_steps,
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        **arguments,
    ).images
    return [np.asarray(picture) for picture in pictures]


@pytest.mark.parametrize(
    ("name", "negative"),
    # The Flux is distilled for guidance: it takes no negative prompt.
    [*((name, False) for name in WRITERS), *((name, True) for name in WRITERS if name != "flux")],
)
def test_pictures_are_those_of_the_pipeline_called_directly(folders, engines, name, negative):
    texts = [("a red cat", "blurred"), ("a sad dog", "drawn x")]
    rows = [
        request(prompt, seed=seed, negative_prompt=bad if negative else "") for seed, (prompt, bad) in enumerate(texts)
    ]
    padded = [*rows, rows[-1]]
    arguments: dict[str, Any] = {"negative_prompt": [row.negative_prompt for row in padded]} if negative else {}
    expected = direct(folders[name], padded, guidance_scale=3.0, **arguments)
    for _ in range(2):  # a pipeline keeps its scheduler's state from call to call
        results = engines[name].generate(rows)
        assert [(result.status, result.batch_slot, result.batch_size) for result in results] == [
            ("ok", 0, BATCH),
            ("ok", 1, BATCH),
        ]
        for result, picture in zip(results, expected, strict=False):
            assert result.pixels.std() > 5
            assert np.array_equal(result.pixels, picture)


@pytest.mark.parametrize("name", WRITERS)
def test_a_rows_bits_do_not_depend_on_its_neighbours(engines, name):
    engine = engines[name]
    negative = "" if name == "flux" else "blurred"
    rows = [request("a red cat", seed=7), request("a red cat", seed=7, negative_prompt=negative)]
    others = [
        request("a longer prompt, of a dog and two birds", seed=1),
        request("dog", seed=2, guidance_scale=5.0),
        request("a sad dog", seed=3),
        request("a red cow", seed=4, negative_prompt=negative),
        request("an unguided one", seed=5, guidance_scale=1.0),
    ]
    alone = [engine.generate([row])[0].pixels for row in rows]
    assert name == "flux" or not np.array_equal(*alone)
    mixed = engine.generate([*others[:3], rows[0], *others[3:], rows[1]])
    assert [result.status for result in mixed] == ["ok"] * len(mixed)
    assert np.array_equal(mixed[3].pixels, alone[0])
    assert np.array_equal(mixed[-1].pixels, alone[1])


def test_only_where_tokens_fix_the_shape_do_rows_part_by_them(engines):
    short, long = request("dog"), request("a longer prompt, of a dog and two birds")
    for name, engine in engines.items():
        keys = [engine._models.batch_key(row) for row in (short, long)]
        assert (keys[0] == keys[1]) == (name != "z-image")


def test_without_a_distilled_input_guidance_is_the_unconditional_pass(undistilled):
    engine = load(undistilled)
    rows = [request(seed=seed, negative_prompt="blurred" if seed else "") for seed in range(BATCH)]
    expected = direct(undistilled, rows, true_cfg_scale=3.0, negative_prompt=[row.negative_prompt for row in rows])
    for result, picture in zip(engine.generate(rows), expected, strict=True):
        assert np.array_equal(result.pixels, picture)
    plain = [request(seed=seed, guidance_scale=1.0) for seed in range(BATCH)]
    for result, picture in zip(engine.generate(plain), direct(undistilled, plain), strict=True):
        assert np.array_equal(result.pixels, picture)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"negative_prompt": "blurred"}, "FluxPipeline takes no negative prompt"),
        ({"width": 72}, "not a multiple of 16"),
        ({"sampler": "ddim"}, "'ddim' is not one of default: FluxPipeline samples by its folder's own scheduler"),
        ({"eta": 0.5}, "eta is 0.5"),
        ({"num_inference_steps": 1001}, "takes 1 to 1000"),
        ({"prompt": "a lone \ud800 surrogate"}, "Error"),
    ],
)
def test_a_bad_request_fails_alone(engines, changes, reason):
    good = request(seed=3)
    results = engines["flux"].generate([good, dataclasses.replace(good, **changes), good])
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert reason in results[1].error


def test_what_a_pipeline_refuses_fails_alone_and_changes_no_neighbour(engines, monkeypatch):
    engine = engines["sd3"]
    rows = [request(seed=1), request("a bad one", seed=2), request(seed=3)]
    sound = engine.generate(rows)
    pipeline = engine._models._pipeline
    encode = pipeline.encode_prompt

    def encode_prompt(**arguments: Any) -> Any:
        if "a bad one" in arguments["prompt"]:
            raise ValueError("not this one")
        return encode(**arguments)

    monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt)
    results = engine.generate(rows)
    assert [result.error for result in results] == [None, "StableDiffusion3Pipeline: ValueError: not this one", None]
    for slot in (0, 2):
        assert np.array_equal(results[slot].pixels, sound[slot].pixels)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_fail_alone_and_are_never_shown_to_the_checker(engines, monkeypatch, poison):
    engine = engines["sd3"]
    decode = engine._models._pipeline.vae.decode

    def decoded(*arguments: Any, **options: Any) -> Any:
        output = decode(*arguments, **options)
        output[0][1, 0, 0, 0] = poison
        return output

    class Checker:
        def __init__(self) -> None:
            self.seen = 0

        def check(self, pixels: np.ndarray) -> SafetyVerdict:
            self.seen += 1
            return SafetyVerdict(checker="test", score=0.9, flagged=True)

    checker = Checker()
    monkeypatch.setattr(engine._models._pipeline.vae, "decode", decoded)
    monkeypatch.setattr(engine, "_safety", checker)
    results = engine.generate([request(seed=seed) for seed in range(3)])
    assert [result.status for result in results] == ["flagged", "failed", "flagged"]
    assert results[1].error == "latents or pixels were not finite in fp32"
    assert checker.seen == 2


def test_a_retry_widens_the_weights_and_narrows_them_back_to_the_very_bits(folders):
    model = load_pipeline(find_pipeline(ModelSpec(model=str(folders["sd3"]))), torch.bfloat16, torch.device("cpu"))
    parts = [part for part in model._pipeline.components.values() if isinstance(part, torch.nn.Module)]

    def weights() -> list[torch.Tensor]:
        return [tensor.clone() for part in parts for tensor in part.state_dict().values() if tensor.is_floating_point()]

    before = weights()
    assert torch.bfloat16 in {tensor.dtype for tensor in before}
    with model.in_fp32() as wide:
        assert {tensor.dtype for tensor in weights()} == {torch.float32}
        (drawn,) = wide.sample([request(seed=seed) for seed in range(2)], 2)
        assert drawn.finite.all()
        assert drawn.pictures.dtype == torch.float32
    after = weights()
    assert [tensor.dtype for tensor in after] == [tensor.dtype for tensor in before]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("flux", ("FluxPipeline", 16, 4, (1024, 1024), "flow", [7, 0])),
        ("sd3", ("StableDiffusion3Pipeline", 16, 4, (128, 128), "flow", [7, 0])),
        ("pixart", ("PixArtSigmaPipeline", 16, 4, (256, 256), "epsilon", [10, 0])),
        ("z-image", ("ZImagePipeline", 16, 4, (1024, 1024), "flow", [9, 0])),
    ],
)
def test_the_description_is_read_from_the_files(folders, name, facts):
    found = describe_model(folders[name])
    counts = load_tokenizer(folders[name]).count(["a red cat", ""])
    assert facts == (
        found.family,
        found.factor,
        found.latent_channels,
        found.default_size,
        found.prediction_type,
        counts,
    )
    assert (found.samplers, found.max_tokens) == (("default",), None)
    on_disk = {path.relative_to(folders[name]).as_posix() for path in folders[name].rglob("*") if path.is_file()}
    assert found.files.keys() == on_disk


REAL_SIZES = {
    "FLUX.1": (
        {"in_channels": 64, "patch_size": 1},
        {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
        16,
        1024,
    ),
    "SD 3.5": (
        {"in_channels": 16, "patch_size": 2, "sample_size": 128},
        {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
        16,
        1024,
    ),
    "Qwen-Image": ({"in_channels": 64, "patch_size": 2}, {"dim_mult": [1, 2, 4, 4], "z_dim": 16}, 16, 1024),
    "Z-Image": (
        {"in_channels": 16, "all_patch_size": [2]},
        {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
        16,
        1024,
    ),
    "Sana 512": (
        {"in_channels": 32, "patch_size": 1, "sample_size": 16},
        {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "latent_channels": 32},
        32,
        512,
    ),
    "FLUX.2": (
        {"in_channels": 128, "patch_size": 1},
        {"block_out_channels": [128, 256, 512, 512], "latent_channels": 32, "patch_size": [2, 2]},
        16,
        1024,
    ),
}


@pytest.mark.parametrize("name", REAL_SIZES)
def test_the_factor_follows_from_the_numbers_of_real_configs(tmp_path, name):
    transformer, vae, factor, side = REAL_SIZES[name]
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}
    for path, content in (("model_index", index), ("transformer/config", transformer), ("vae/config", vae)):
        (tmp_path / f"{path}.json").parent.mkdir(exist_ok=True)
        (tmp_path / f"{path}.json").write_text(json.dumps(content))
    found = find_pipeline(ModelSpec(model=str(tmp_path)))
    assert (found.factor, found.default_size) == (factor, (side, side))


def test_planning_needs_neither_torch_nor_diffusers(folders):
    script = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from latentmill.engine import describe_model\n"
        f"print(len(describe_model({str(folders['pixart'])!r}).files))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 10


def test_without_the_extra_the_message_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(EngineError, match=r"is a FluxPipeline, .*pip install 'latentmill\[diffusers\]'"):
        load(folders["flux"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_syntax": "a1111"}, "prompt_syntax is 'a1111'"),
        ({"long_prompts": "chunk"}, "long_prompts 'chunk'"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing is 'trailing'"),
        ({"tokenizer": "x"}, "tokenizer is 'x'"),
        ({"safety": "clip-concepts"}, "no safety_checker folder"),
    ],
)
def test_what_it_cannot_be_told_is_refused(folders, changes, reason):
    with pytest.raises(EngineError, match=reason):
        load(folders["sd3"], **changes)


def test_gaps_are_named(folder):
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    gone = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, weights)
    with pytest.raises(EngineError, match=f"lacks 1 weights of SD3Transformer2DModel, the first: {gone}"):
        load(folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(EngineError, match=r"transformer has no weights: looked for \*.safetensors"):
        describe_model(folder)
    shards = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))
    (folder / "transformer/part-1.safetensors").touch()
    with pytest.raises(EngineError, match=r"lacks part-2\.safetensors"):
        describe_model(folder)
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(EngineError, match="scheduler is missing or empty"):
        describe_model(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionUpscalePipeline", "no text-to-image pipeline: its call takes no width, height"),
        ("NoSuchPipeline", "which diffusers .* does not have"),
        ("AutoencoderKL", "no text-to-image pipeline: its call takes no prompt"),
        ("HunyuanVideoPipeline", "num_frames"),
    ],
)
def test_other_kinds_of_pipeline_are_refused(folder, name, reason):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(EngineError, match=reason):
        load(folder)


def test_the_engines_own_models_take_no_default_sampler(engine):
    result = engine.generate([GenerationRequest(prompt="a", width=64, height=64, sampler="default")])[0]
    assert "'default' is not one of ddim, plms" in result.error


def test_the_execution_class_names_the_library(engines, engine):
    assert engines["sd3"].execution_class.endswith(f"batch {BATCH}, diffusers {diffusers.__version__}")
    assert "diffusers" not in engine.execution_class
