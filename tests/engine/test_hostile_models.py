"""A model from a stranger: whatever its files claim, the answer is one line that names the file, soon."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model
from latentmill.engine.loading.checkpoint import open_weights
from tests.engine.families import write_ldm

pytestmark = pytest.mark.slow

UNET = "unet/diffusion_pytorch_model.safetensors"
SECONDS, BYTES = 20, 2 * 2**30


@pytest.fixture
def folder(eps_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(eps_model, tmp_path / "model"))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No more address space than was taken before, and a little: who asks for much more gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    started = time.monotonic()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < SECONDS


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(ModelSpec(model=str(folder), **{"safety": "none", **options}), device="cpu", dtype="float32")


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(EngineError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


FIELDS = [
    ("unet/config.json", "layers_per_block", "1e9"),
    ("unet/config.json", "layers_per_block", "1000000000"),
    ("unet/config.json", "transformer_layers_per_block", "1000000000"),
    ("unet/config.json", "transformer_layers_per_block", "[64, 64, 64]"),
    ("unet/config.json", "block_out_channels", "[16, 32, 1000000000]"),
    ("unet/config.json", "block_out_channels", '"16"'),
    ("unet/config.json", "block_out_channels", json.dumps([16] * 100_000)),
    ("unet/config.json", "attention_head_dim", "-4"),
    ("unet/config.json", "attention_head_dim", "{}"),
    ("unet/config.json", "norm_num_groups", "0"),
    ("unet/config.json", "norm_num_groups", "7"),
    ("unet/config.json", "norm_eps", "1e400"),
    ("unet/config.json", "norm_eps", "NaN"),
    ("unet/config.json", "sample_size", "1000000000"),
    ("unet/config.json", "in_channels", "true"),
    ("unet/config.json", "cross_attention_dim", "1e400"),
    ("unet/config.json", "flip_sin_to_cos", '"no"'),
    ("unet/config.json", "down_block_types", '[["CrossAttnDownBlock2D"], {}, 3]'),
    ("unet/config.json", "act_fn", json.dumps("x" * 100_000)),
    ("vae/config.json", "block_out_channels", "[]"),
    ("vae/config.json", "layers_per_block", "1000000000"),
    ("vae/config.json", "scaling_factor", "0"),
    ("vae/config.json", "scaling_factor", "1e400"),
    ("vae/config.json", "shift_factor", "-Infinity"),
    ("vae/config.json", "num_vq_embeddings", "1000000000000"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "1000000000"),
    ("scheduler/scheduler_config.json", "beta_end", "Infinity"),
    ("scheduler/scheduler_config.json", "beta_start", "1" + "0" * 400),
    ("scheduler/scheduler_config.json", "trained_betas", "[0.1, 0.2]"),
    ("scheduler/scheduler_config.json", "trained_betas", "[NaN]"),
    ("scheduler/scheduler_config.json", "steps_offset", "-2000"),
    ("text_encoder/config.json", "num_hidden_layers", "1000000000"),
    ("text_encoder/config.json", "vocab_size", "1000000000000"),
    ("text_encoder/config.json", "max_position_embeddings", "1000000000"),
    ("text_encoder/config.json", "intermediate_size", "1e400"),
    ("text_encoder/config.json", "num_attention_heads", "5"),
    ("text_encoder/config.json", "hidden_act", '["gelu"]'),
    ("text_encoder/config.json", "hidden_act", '"os.system"'),
    ("text_encoder/config.json", "layer_norm_eps", "NaN"),
]


@pytest.mark.parametrize(("path", "name", "value"), FIELDS)
def test_a_field_beyond_its_kind_or_limit_is_refused_by_name(folder, path, name, value):
    config = {**json.loads((folder / path).read_text()), name: "HERE"}
    (folder / path).write_text(json.dumps(config).replace('"HERE"', value))
    message = refusal(describe_model, folder)
    assert f"{path} has " in message
    assert name in message


@pytest.mark.parametrize(("name", "value"), [("encoder_layers", 10**9), ("d_model", -1), ("head_dim", 1e300)])
def test_so_is_one_of_the_text_encoder_of_latent_diffusion(tmp_path, name, value):
    folder = write_ldm(tmp_path / "ldm")
    path = folder / "bert/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert f"bert/config.json has {name}=" in refusal(describe_model, folder)


@pytest.mark.parametrize("part", ["..", "/etc", "../folder/unet", "unet/../..", "", "*", "unet\0"])
def test_a_part_of_a_pipeline_never_leads_out_of_its_folder(folder, part):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LuminaPipeline", part: ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="a part's name is that of a folder beside it"):
        describe_model(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 1_000_000, '{"a":' * 100_000, "{", "[]", "\x00", '{"layers_per_block": ' + "9" * 5000 + "}"],
    ids=["deep list", "deep object", "cut", "list", "nul", "digits"],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_json_that_is_broken_or_nested_without_end_is_refused(folder, name, text):
    (folder / name).write_text(text)
    assert name in refusal(describe_model, folder)


def test_a_json_file_of_gigabytes_is_not_read(folder):
    os.truncate(folder / "unet/config.json", 5 * 2**30)
    assert "unet/config.json is larger than 16777216 bytes" in refusal(describe_model, folder)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        UNET,
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    ],
)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder, kind, name):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text("{}")
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    message = refusal(lambda: load(folder, safety="auto"))
    assert str(path.parent) in message


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_that_is_a_pipe_is_not_waited_for(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    os.mkfifo(path)
    assert "is a pipe or a device" in refusal(describe_model, path)
    assert "is a folder, a pipe or a device" in refusal(open_weights, path)


def test_nothing_else_of_a_text_encoders_config_counts(folder):
    before = load(folder)._models.text.encode(["a red cat"]).context
    path = folder / "text_encoder/config.json"
    evil = {
        "attn_implementation": "flash_attention_2",
        "_attn_implementation_internal": "kernels-community/evil",
        "auto_map": {"AutoModel": "evil.Model"},
        "quantization_config": {"quant_method": "bitsandbytes"},
        "return_dict": False,
        "attention_dropout": 1e9,
        "bos_token_id": [],
        "torch_dtype": "float64",
        "self": 1,
        "dtype": "nonsense",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **evil}))
    assert torch.equal(load(folder)._models.text.encode(["a red cat"]).context, before)


def header(entries: dict[str, Any] | str, data: bytes = b"\0" * 64) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(*offsets: Any, shape: Any = (4,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "negative": header({"a": entry(-16, 0)}),
    "beyond the file": header({"a": entry(0, 10**12, shape=[25 * 10**10])}),
    "overlapping": header({"a": entry(0, 16), "b": entry(8, 24)}),
    "with a gap": header({"a": entry(16, 32)}),
    "backwards": header({"a": entry(16, 0)}),
    "no whole number": header({"a": entry(0.5, 16)}),
    "text": header({"a": entry("0", "16")}),
    "one": header({"a": entry(0)}),
    "too large to count": header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1e400]}}'),
    "shape": header({"a": entry(0, 16, shape=[2**62, 2**62])}),
    "negative shape": header({"a": entry(0, 16, shape=[-4])}),
    "dtype": header({"a": {**entry(0, 16), "dtype": "F33"}}),
    "no object": header("[]"),
    "no entry": header({"a": 3}),
    "metadata": header({"__metadata__": {"modelspec.prediction_type": ["v"]}, "a": entry(0, 16)}),
    "deep": header('{"a":' * 200_000),
    "longer than the file": struct.pack("<Q", 2**20) + b"{}",
    "longer than any": struct.pack("<Q", 2**63),
    "empty": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_odd_offsets_and_headers_of_safetensors_are_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[kind])
    assert "model.safetensors cannot be read" in refusal(open_weights, path)


def test_a_header_of_a_hundred_megabytes_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100 * 2**20 - 1))
    os.truncate(path, 101 * 2**20)
    assert "the limit is 16777216" in refusal(open_weights, path)


def test_keys_that_count_without_end_are_refused(folder, tmp_path):
    unet, vae = (
        "model.diffusion_model.input_blocks.1000000000.0.op",
        "first_stage_model.encoder.down.9999999999.block.0",
    )
    for key in (f"{unet}.weight", f"{vae}.weight"):
        path = tmp_path / "model.safetensors"
        save_file(
            {
                "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
                "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(1),
                key: torch.zeros(1),
            },
            path,
        )
        assert "model.safetensors looks like Stable Diffusion 1, but" in refusal(describe_model, path)


def archive(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", program)
        for name, data in members.items():
            file.writestr(f"m/{name}", data)
    return path


COLLIDING = b"".join(pickle.dumps(n * (2**61 - 1), 2)[2:-1] + b"N" for n in range(150_000))
GLOBAL_DICT = b"ccollections\nOrderedDict\n"
PICKLES = {
    "memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
    "lists without end": b"\x80\x02" + b"]" * 3_000_000 + b".",
    "sets without end": b"\x80\x04" + b"\x8f" * 3_000_000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b".",
    "nested tuples as a key": b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.",
    "colliding keys": b"\x80\x02}(" + COLLIDING + b"u.",
    "an array of terabytes": b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + struct.pack("<q", 2**42) + b"\x85R.",
    "a byte array of terabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b".",
    "a text of terabytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**42) + b".",
    "copies of copies": (
        b"\x80\x02}(" + b"".join(b"X\x06\x00\x00\x00%06dN" % n for n in range(200_000)) + b"uq\x00"
        + GLOBAL_DICT + b"q\x01" + b"h\x01h\x00\x85R" * 50_000 + b"."
    ),
    "a reduce of nothing": b"\x80\x02R.",
    "no end": b"\x80\x02}",
    "long number": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_expands_without_end_is_refused_soon(tmp_path, kind, zipped):
    path = tmp_path / "model.ckpt"
    if zipped:
        archive(path, PICKLES[kind])
    else:
        path.write_bytes(PICKLES[kind])
    assert "model.ckpt" in refusal(describe_model, path)


def test_a_pickle_or_a_mark_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    path = tmp_path / "model.ckpt"
    archive(path, b"N" * 2**26)
    assert "its pickle takes 67108864 bytes, the limit is 16777216" in refusal(open_weights, path)
    archive(path, b"\x80\x02}.", byteorder=b"l" * 2**28)
    assert "big-endian" in refusal(open_weights, path)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    number = torch.zeros(1)
    torch.save({"a": number.expand(2**20, 2**20)}, path)
    assert "claim 4398046511104 bytes" in refusal(open_weights, path)
    shared = torch.zeros(10_000)
    torch.save({f"key{number}": shared for number in range(1000)}, path)
    assert "its tensors claim 40000000 bytes" in refusal(open_weights, path)
    torch.save({"a": number.expand(50)}, path)
    assert "the numbers of 'a' are not in it" in refusal(open_weights(path).read, "a")


CHECKER = {"projection_dim": 12, "vision_config": {"hidden_size": 24, "num_attention_heads": 2, "patch_size": 8}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("projection_dim", 10**12),
        ("vision_config", {"num_hidden_layers": 10**9}),
        ("vision_config", {"image_size": 10**9}),
        ("vision_config", {"hidden_size": 2**15, "num_hidden_layers": 256}),
        ("vision_config", {"num_attention_heads": 0}),
        ("vision_config", [1]),
    ],
)
def test_a_safety_checkers_config_is_held_to_limits_and_to_its_weights(folder, name, value):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text(json.dumps({**CHECKER, name: value}))
    save_file({"concept_embeds": torch.zeros(17, 12)}, folder / "safety_checker/model.safetensors")
    assert "safety_checker/" in refusal(lambda: load(folder, safety="auto"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", {"shortest_edge": 10**9}),
        ("crop_size", {"height": 10**6, "width": 224}),
        ("size", [224]),
        ("resample", 77),
        ("image_std", [0, 1, 1]),
        ("image_mean", [0.5]),
    ],
)
def test_so_are_an_image_processors_settings(folder, name, value):
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
    (folder / "safety_checker/config.json").write_text(json.dumps(CHECKER))
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps({name: value}))
    message = refusal(lambda: load(folder, safety="auto"))
    assert "preprocessor_config.json" in message
    assert name in message or "shortest_edge" in message


def test_weights_are_still_read_where_nothing_is_wrong(folder):
    expected = {key: tuple(value.shape) for key, value in load_file(folder / UNET).items()}
    assert open_weights(folder / UNET).shapes == expected
