"""The models of the paper itself: a text encoder trained along with the U-Net, an autoencoder with KL or a codebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMTextToImagePipeline, VQModel
from safetensors.torch import load_file

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model, load_tokenizer
from latentmill.engine.families.ldm import LdmBertEncoder
from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.autoencoder import build_autoencoder
from tests.engine.families import (
    assert_same_pictures,
    assert_same_unet,
    autoencoder_of,
    ldm_bert,
    reference_pictures,
    requests,
    write_ldm,
)
from tests.engine.originals import write_ckpt, write_safetensors

KINDS = ("kl", "vq", "vq-f8")
FACTORS = {"kl": 8, "vq": 4, "vq-f8": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ldm")
    return {kind: write_ldm(root / kind, kind) for kind in KINDS}


def load(model: Path, **spec: str) -> Engine:
    return Engine.load(ModelSpec(model=str(model), safety="none", **spec), device="cpu", dtype="float32", batch_size=4)


def pictures(engine: Engine, rows) -> np.ndarray:
    return np.stack([result.pixels for result in engine.generate(rows)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_pictures_equal_the_reference_pipelines(kind, guidance_scale, folders):
    rows = requests(8 * FACTORS[kind], guidance_scale=guidance_scale)
    engine, pipeline = load(folders[kind]), LDMTextToImagePipeline.from_pretrained(folders[kind])
    assert_same_unet(engine, pipeline)
    assert_same_pictures(pictures(engine, rows), reference_pictures(pipeline, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_with_the_original_names_draws_the_same(kind, folders, tmp_path):
    """The names are held against the original modules in test_original_names.py."""
    rows = requests(8 * FACTORS[kind], steps=2)
    write = write_ckpt if kind == "kl" else write_safetensors
    file = write(folders[kind], tmp_path / ("model.ckpt" if kind == "kl" else "model.safetensors"))
    found, expected = load(file, tokenizer=str(folders[kind])), load(folders[kind])
    assert found.description.family == "latent-diffusion"
    assert np.array_equal(pictures(found, rows), pictures(expected, rows))


def test_the_weights_of_the_first_published_folders_are_pickles(folders, tmp_path):
    folder = write_ldm(tmp_path / "pickled", legacy_weights=True)
    torch.save(load_file(folder / "bert/model.safetensors"), folder / "bert/pytorch_model.bin")
    (folder / "bert/model.safetensors").unlink()
    assert not list(folder.rglob("*.safetensors"))
    assert "unet/diffusion_pytorch_model.bin" in describe_model(folder).files
    rows = requests(64, steps=1)
    assert np.array_equal(pictures(load(folder), rows), pictures(load(folders["kl"]), rows))


def test_the_text_encoder_computes_what_the_reference_computes():
    torch.manual_seed(0)
    reference = ldm_bert(50, 96, 3)
    encoder = LdmBertEncoder(config=reference.config.to_dict(), component="bert", tokenizer="")
    ours = encoder.build()
    weights = {encoder.folder_name(key): tensor for key, tensor in reference.state_dict().items()}
    ours.load_state_dict({key: tensor for key, tensor in weights.items() if key is not None})
    ids = torch.randint(0, 50, (3, 77))
    with torch.no_grad():
        expected = reference(ids)[0]
        found = ours(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["vq", "vq-f8"])
def test_the_decoder_absorbs_the_codebook_as_the_references_does(kind):
    torch.manual_seed(0)
    reference: VQModel = autoencoder_of(kind).eval()
    ours = build_autoencoder(VAEConfig.from_dict({**reference.config})).eval()
    ours.load_state_dict(reference.state_dict())
    latents = torch.randn(2, reference.config.latent_channels, 6, 10)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected, raw = reference.decode(latents).sample, reference.decode(latents, force_not_quantize=True).sample
        found = ours.decode(latents)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (found - raw).abs().max() > 0.1 * raw.abs().max(), "the codebook has no effect"
        encoded = reference.encode(pixels).latents
        assert (ours.encode(pixels) - encoded).abs().max() <= 1e-4 * encoded.abs().max()


def test_prompts_are_cut_into_berts_words(folders):
    assert load_tokenizer(folders["kl"]).count(["a red cat", ""]) == [3, 0]
    assert describe_model(folders["kl"]).max_tokens == 77
    assert "tokenizer/vocab.txt" in {
        name.replace("tokenizer.json", "vocab.txt") for name in describe_model(folders["kl"]).files
    }


def test_without_its_vocabulary_a_single_file_says_where_to_get_one(folders, tmp_path, monkeypatch):
    file = write_safetensors(folders["kl"], tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match=r"bert-base-uncased .* vocab.txt.*hf download bert-base-uncased"):
        describe_model(ModelSpec(model=str(file)))
