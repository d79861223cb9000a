"""Models by hub id: found in the hub's cache without a network, or one line says what is needed and how to get it."""

from __future__ import annotations

import fnmatch
import logging.handlers
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec, describe_model
from tests.engine.diffusers_models import in_shards, write_flux, write_pixart
from tests.engine.families import write_ldm

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repo: str, folder: Path) -> Path:
    """As the hub's client lays files down: snapshots by commit, branches as references to one."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_model_in_the_cache_needs_no_network(cache, eps_model, revision):
    snapshot = put(cache, "someone/a-model", eps_model)
    description = describe_model(ModelSpec(model="someone/a-model", revision=revision))
    assert description.path == snapshot
    assert description.files == describe_model(eps_model).files


def test_a_model_of_the_cache_draws_as_the_folder_does(cache, eps_model):
    put(cache, "someone/a-model", eps_model)
    row = GenerationRequest(prompt="a red cat", width=64, height=64, num_inference_steps=2)
    found, expected = (
        Engine.load(ModelSpec(model=model, safety="none"), device="cpu", dtype="float32", batch_size=1)
        .generate([row])[0]
        .pixels
        for model in ("someone/a-model", str(eps_model))
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("revision", [None, "f" * 40])
def test_a_model_that_is_not_there_is_told_in_one_line(cache, eps_model, revision):
    if revision is not None:
        put(cache, "someone/a-model", eps_model)
    with pytest.raises(EngineError) as caught:
        describe_model(ModelSpec(model="someone/a-model", revision=revision))
    message = str(caught.value)
    for part in ("someone/a-model", str(cache), "model_index.json", "hf download someone/a-model", "local copy"):
        assert part in message
    assert ("--revision " + "f" * 40 in message) == (revision is not None)
    assert "\n" not in message


def test_half_a_model_in_the_cache_names_the_gap(cache, eps_model):
    snapshot = put(cache, "someone/a-model", eps_model)
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"vae has no weights: looked for diffusion_pytorch_model.safetensors"):
        describe_model(ModelSpec(model="someone/a-model"))


def test_pickled_weights_will_do_where_there_is_no_safetensors(cache, tmp_path):
    put(cache, "someone/first", write_ldm(tmp_path / "pickled", legacy_weights=True))
    files = describe_model(ModelSpec(model="someone/first")).files
    assert "unet/diffusion_pytorch_model.bin" in files


@pytest.mark.parametrize("name", ["no-such-preset", "a/b/c", "./nowhere", "models/ldm/text2img256/model.ckpt"])
def test_what_is_no_hub_id_is_not_looked_up(cache, name):
    with pytest.raises(EngineError, match="does not exist; give a local diffusers folder"):
        describe_model(name)


def test_a_pipeline_of_diffusers_is_fetched_with_all_its_parts(cache, tmp_path, monkeypatch):
    snapshot = put(cache, "someone/a-pixart", write_pixart(tmp_path / "pixart"))
    asked = []
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *names, **options: (asked.append(options), fetch(*names, **options))[1],
    )
    found = describe_model("someone/a-pixart")
    assert (found.path, found.family) == (snapshot, "PixArtSigmaPipeline")
    patterns = asked[-1]["allow_patterns"]
    for name in found.files:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_a_transformer_is_fetched_with_its_shards_and_all_tokenizers(cache, tmp_path, monkeypatch):
    put(cache, "someone/a-flux", in_shards(write_flux(tmp_path / "flux"), tmp_path / "sharded"))
    asked = []
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *names, **options: (asked.append(options), fetch(*names, **options))[1],
    )
    found = describe_model("someone/a-flux")
    assert found.family == "flux"
    assert any("-of-" in name for name in found.files)
    for name in found.files:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in asked[-1]["allow_patterns"]), name
    assert not any(fnmatch.fnmatch("flux1-dev.safetensors", pattern) for pattern in asked[-1]["allow_patterns"])


def test_what_the_client_says_of_every_try_is_not_shown_beside_the_error(cache, monkeypatch):
    said = logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [said])

    def unreachable(*_args, **_options):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(EngineError, match="The hub's client said: no route"):
        describe_model(ModelSpec(model="someone/a-model", revision=COMMIT))
    assert said.buffer == []
    assert logging.getLogger("huggingface_hub").level == before
