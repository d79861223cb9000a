"""Half a model folder, a wrong one, a changed one: refused by name before anything heavy happens."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model, load_tokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(eps_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(eps_model, tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_folder_is_described_without_torch(eps_model):
    description = describe_model(eps_model)
    assert (description.factor, description.latent_channels, description.default_size) == (8, 4, (256, 256))
    assert description.max_tokens == 77
    assert {UNET, VAE, "model_index.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= set(
        description.files
    )
    assert all(len(digest) == 64 for digest in description.files.values())


def test_each_byte_of_the_weights_counts_in_the_description(folder):
    before = describe_model(folder).files
    with (folder / UNET).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    after = describe_model(folder).files
    assert [path for path in before if before[path] != after[path]] == [UNET]


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        UNET,
        VAE,
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer",
    ],
)
def test_half_a_folder_is_refused_and_the_gap_named(folder, missing):
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(EngineError, match=Path(missing).parts[0]):
        describe_model(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(EngineError, match="does not exist"):
        describe_model(tmp_path / "nowhere")


def test_parts_of_two_models_are_refused(folder):
    edit_json(folder / "text_encoder/config.json", hidden_size=64)
    with pytest.raises(EngineError, match="64 wide, the denoiser's attention expects 32"):
        describe_model(folder)


def test_a_pipeline_with_code_of_its_own_is_refused(folder):
    edit_json(folder / "model_index.json", _class_name=["pipeline", "FluxPipeline"])
    with pytest.raises(EngineError, match="FluxPipeline"):
        describe_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", "1 keys missing .first: .'conv_in.bias'"),
        ("add", "1 unexpected .first: .'stray'"),
        ("shape", "conv_in.bias has shape .3,."),
    ],
)
def test_keys_must_match_strictly(folder, change, message):
    tensors = load_file(folder / UNET)
    if change == "drop":
        del tensors["conv_in.bias"]
    elif change == "add":
        tensors["stray"] = torch.zeros(1)
    else:
        tensors["conv_in.bias"] = torch.zeros(3)
    save_file(tensors, folder / UNET)
    with pytest.raises(EngineError, match=message):
        Engine.load(ModelSpec(model=str(folder), safety="none"), device="cpu", dtype="float32")


def test_truncated_weights_are_refused(folder):
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])
    with pytest.raises(EngineError, match="cannot be read"):
        Engine.load(ModelSpec(model=str(folder), safety="none"), device="cpu", dtype="float32")


def test_the_attention_names_of_early_folders_are_read(folder, eps_model):
    tensors = load_file(folder / VAE)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(?<=\.)(to_q|to_k|to_v|to_out\.0)(?=\.)")
    renamed = {pattern.sub(lambda match: old_names[match[0]], key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / VAE)
    loaded = Engine.load(ModelSpec(model=str(folder), safety="none"), device="cpu", dtype="float32")
    for key, tensor in loaded._models.autoencoder.state_dict().items():
        assert torch.equal(tensor, tensors[key])


def test_a_checker_that_cannot_be_had_is_an_error_and_never_replaced(folder):
    (folder / "safety_checker").mkdir()
    with pytest.raises(EngineError, match=r"safety_checker/config\.json is missing"):
        Engine.load(ModelSpec(model=str(folder)), device="cpu", dtype="float32")


def test_the_tokenizer_counts_without_marks(eps_model):
    assert load_tokenizer(eps_model).count(["abc", "", "a b"]) == [3, 0, 2]
    assert load_tokenizer(eps_model).count([]) == []
