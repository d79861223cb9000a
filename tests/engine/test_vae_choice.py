"""Another autoencoder in place of the model's own, and tiny decoders for previews: as the reference library's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file, save_file

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model
from latentmill.engine.loading.keys import original_names
from latentmill.engine.loading.layout import find_model
from tests.engine.families import (
    assert_same_pictures,
    autoencoder,
    reference_pictures,
    requests,
    write_sd1,
    write_sdxl,
)
from tests.engine.originals import write_safetensors

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd1(tmp_path_factory.mktemp("vae") / "sd1")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(9)
    autoencoder(0.5, block_out_channels=(64, 32, 64)).save_pretrained(tmp_path_factory.mktemp("other") / "vae")
    return tmp_path_factory.getbasetemp() / "other0" / "vae"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(8)
    widths = {f"{side}_block_out_channels": (32,) * 3 for side in ("encoder", "decoder")}
    blocks = {"num_encoder_blocks": (1, 2, 2), "num_decoder_blocks": (2, 2, 1)}
    folder = tmp_path_factory.mktemp("tiny") / "taesd"
    AutoencoderTiny(**widths, **blocks).save_pretrained(folder)
    return folder


def load(model: Path, **spec: str) -> Engine:
    return Engine.load(ModelSpec(model=str(model), safety="none", **spec), device="cpu", dtype="float32", batch_size=4)


def drawn(engine: Engine) -> np.ndarray:
    results = engine.generate(requests(32))
    assert [result.error for result in results] == [None] * 4
    return np.stack([result.pixels for result in results])


def original(vae: Path, model: Path, path: Path, prefix: str) -> Path:
    """The folder's weights in a file with the original's names."""
    tensors = load_file(vae / WEIGHTS)
    blueprint = find_model(ModelSpec(model=str(model), vae=str(vae))).blueprint
    origins = original_names(blueprint, "vae", tensors)
    save_file({prefix + origins[key].key.removeprefix("first_stage_model."): t for key, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("form", ["folder", "model", "file", "prefixed file"])
def test_pictures_equal_the_reference_librarys(form, folder, other, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    vae = AutoencoderKL.from_pretrained(other)
    place = other
    if form == "model":
        shutil.copytree(other, tmp_path / "model" / "vae")
        place = tmp_path / "model"
    elif form != "folder":
        place = original(other, folder, tmp_path / "a.safetensors", "first_stage_model." if "prefixed" in form else "")
        vae.register_to_config(scaling_factor=pipeline.vae.config.scaling_factor)  # a file does not say its own
    pipeline.vae = vae
    assert_same_pictures(drawn(load(folder, vae=str(place))), reference_pictures(pipeline, requests(32)))


def test_a_single_file_takes_another_autoencoder_too(folder, other, tmp_path):
    file = write_safetensors(folder, tmp_path / "model.safetensors")
    single = {"tokenizer": str(folder), "timestep_spacing": "leading"}
    assert_same_pictures(drawn(load(file, vae=str(other), **single)), drawn(load(folder, vae=str(other))))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_tiny_decoder_draws_what_the_reference_librarys_draws(form, folder, tiny, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    place = tiny
    if form == "file":
        torch.manual_seed(7)
        whole = AutoencoderTiny()  # a file's shapes tell its width, and its levels are the published ones
        folder = write_sd1_of_f8(tmp_path / "f8")
        pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
        place = tmp_path / "taesd_decoder.safetensors"
        save_file({original_key(key): t for key, t in whole.decoder.state_dict().items()}, place)
        pipeline.vae = whole
    else:
        pipeline.vae = AutoencoderTiny.from_pretrained(tiny)
    rows = requests(32)
    expected, found = reference_pictures(pipeline, rows), drawn(load(folder, preview_decoder=str(place)))
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len({picture.tobytes() for picture in expected}) == len(rows)


def original_key(key: str) -> str:
    number, _, rest = key.removeprefix("layers.").partition(".")
    return f"{int(number) + 1}.{rest}"


def write_sd1_of_f8(folder: Path) -> Path:
    write_sd1(folder)
    shutil.rmtree(folder / "vae")
    levels = 4
    autoencoder(
        0.18215,
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).save_pretrained(folder / "vae")
    return folder


def test_its_files_count_in_place_of_the_models_own(folder, other, tiny):
    own = describe_model(folder).files
    changed = describe_model(ModelSpec(model=str(folder), vae=str(other))).files
    assert own.keys() == changed.keys()
    assert {name for name in own if own[name] != changed[name]} == {f"vae/{WEIGHTS}", "vae/config.json"}
    preview = describe_model(ModelSpec(model=str(folder), preview_decoder=str(tiny))).files
    assert preview[f"vae/{WEIGHTS}"] not in {own[f"vae/{WEIGHTS}"], changed[f"vae/{WEIGHTS}"]}


def test_sdxls_autoencoder_may_run_in_half_precision_if_another_bears_it(tmp_path):
    model = write_sdxl(tmp_path / "sdxl")
    shutil.copytree(model / "vae", tmp_path / "fixed")
    config = tmp_path / "fixed" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    assert find_model(ModelSpec(model=str(model))).blueprint.autoencoder.force_upcast
    fixed = find_model(ModelSpec(model=str(model), vae=str(tmp_path / "fixed")))
    assert not fixed.blueprint.autoencoder.force_upcast


def test_what_does_not_fit_is_refused_by_name(folder, other, tiny, tmp_path):
    deep = write_sd1_of_f8(tmp_path / "f8") / "vae"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.ckpt").write_bytes(b"x")
    file = original(other, folder, tmp_path / "extra.safetensors", "")
    save_file({**load_file(file), "decoder.more.weight": torch.zeros(1)}, file)
    missing = original(other, folder, tmp_path / "missing.safetensors", "")
    save_file({key: t for key, t in load_file(missing).items() if key != "post_quant_conv.bias"}, missing)
    bad: list[tuple[dict[str, object], str]] = [
        ({"vae": deep}, "has 8 pixels per cell, the model's own has 4"),
        ({"vae": tiny}, "of 'AutoencoderTiny', expected AutoencoderKL or VQModel"),
        ({"preview_decoder": other}, "of 'AutoencoderKL', expected AutoencoderTiny"),
        ({"vae": tmp_path / "empty"}, "config.json is missing"),
        ({"vae": tmp_path / "a.ckpt"}, "is read from .safetensors alone"),
        ({"vae": "gone"}, "does not exist"),
        ({"vae": other, "preview_decoder": tiny}, "use one of them"),
        ({"preview_decoder": file}, "is not a tiny decoder"),
        ({"vae": file}, r"1 unexpected \(first: \['decoder.more.weight'\]\)"),
        ({"vae": missing}, r"1 keys missing \(first: \['post_quant_conv.bias'\]\)"),
    ]
    for spec, reason in bad:
        with pytest.raises(EngineError, match=reason):
            load(folder, **{name: str(place) for name, place in spec.items()})
