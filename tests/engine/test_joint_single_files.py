"""Stable Diffusion 3's and Flux's single files: names as their authors wrote them, whole or with parts elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model
from latentmill.engine.families import compvis, flux, sd3
from latentmill.engine.families.clip import ClipEncoder
from latentmill.engine.families.family import Family, TextEncoderSpec
from latentmill.engine.families.t5 import T5Encoder
from latentmill.engine.loading.single_file import recognise
from latentmill.engine.loading.weights import claim_single_file
from tests.engine.diffusers_models import SCHNELL_SCHEDULER, write_flux, write_sd3
from tests.engine.families import requests
from tests.engine.originals import as_original, joint_weights
from tests.engine.test_original_names import CLIP_L, OPEN_CLIP_G, Listing, digest
from tests.engine.test_transformer_networks import (
    FLUX_DEV,
    PUBLISHED,
    SD3_MEDIUM,
    SD35_LARGE,
    SD35_MEDIUM,
    T5_XXL,
    VAE_16,
    ours,
)

MODEL, VAE = "model.diffusion_model.", "first_stage_model."


def marked(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights whose every row says whose it is, one column wide: what joins and parts weights does it by rows."""
    starts = np.cumsum([0, *(shape[0] for shape in shapes.values())]).tolist()
    return {
        key: torch.arange(start, start + shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        for start, (key, shape) in zip(starts, shapes.items(), strict=False)
    }


def transformer(family: Family, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our weights at real width, and the same by their original names."""
    read = family.denoiser.read(config, "config.json")
    with torch.device("meta"):
        network = ours(family, config)
    weights = marked({key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})
    return weights, as_original(family.denoiser.original_names(read, weights), weights)


FEW = {"num_layers": 3, "num_single_layers": 2}
REAL = {
    "sd3-medium": (sd3.FAMILY, SD3_MEDIUM | {"num_layers": 3}, convert_sd3_transformer_checkpoint_to_diffusers),
    "sd35-large": (sd3.FAMILY, SD35_LARGE | {"num_layers": 3}, convert_sd3_transformer_checkpoint_to_diffusers),
    "sd35-medium": (
        sd3.FAMILY,
        SD35_MEDIUM | {"num_layers": 3, "dual_attention_layers": [0, 1]},
        convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "flux-dev": (flux.FAMILY, FLUX_DEV | FEW, convert_flux_transformer_checkpoint_to_diffusers),
}


@pytest.mark.parametrize("prefix", ["", MODEL])
@pytest.mark.parametrize("name", REAL)
def test_the_references_conversion_gives_our_weights_row_by_row(name, prefix):
    family, config, convert = REAL[name]
    weights, originals = transformer(family, config)
    found = convert({prefix + key: tensor for key, tensor in originals.items()})
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(found[key].reshape(tensor.shape), tensor), key


ORIGINALS = {
    "sd3-medium": (491, "37026a80c799e08efcdbd0b517f326d6fe3a9b4925e440d218827e307d040b2b"),
    "sd35-large": (923, "d73da97d9c7f485f6679e21e8263ada1f94f313a22423a26a9a521ec99674d74"),
    "sd35-medium": (665, "d1a44fe78e34c9cdec236af5f8ec80058ba6dcab81d6ae11be40ebf5e6d42237"),
    "flux-schnell": (776, "52689c68aa55ffafecd1df380d95eb03584cb990ea330be809514f5e9638d77c"),
    "flux-dev": (780, "54111f97ed587fc4b278df82593209ed620f470933d3a9177befaadcd3a54ed8"),
}
"""The authors' own modules (Stability-AI/sd3.5, black-forest-labs/flux), built elsewhere on torch's meta device: the
number of their keys, and the sha256 of the sorted lines `key shape`."""

ENCODERS: dict[str, TextEncoderSpec] = {
    "clip_l": ClipEncoder(component="text_encoder", tokenizer="tokenizer", alias="clip_l").configured(
        CLIP_L, "config.json"
    ),
    "clip_g": ClipEncoder(
        component="text_encoder_2", tokenizer="tokenizer_2", alias="clip_g", projection=True
    ).configured(OPEN_CLIP_G, "config.json"),
    "t5xxl": T5Encoder(component="t5", tokenizer="tokenizer_3", alias="t5xxl").configured(T5_XXL, "config.json"),
}


def real_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transformer's file as its authors wrote it, from our networks and our table."""
    family, _, config, _ = PUBLISHED[name]
    read = family.denoiser.read(config, "config.json")
    with torch.device("meta"):
        weights = ours(family, config).state_dict()
    originals = as_original(family.denoiser.original_names(read, weights), weights)
    return {key: tuple(tensor.shape) for key, tensor in originals.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_our_names_and_shapes_are_those_of_the_authors_modules(name):
    shapes = real_shapes(name)
    assert (len(shapes), digest(shapes)) == ORIGINALS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3-medium", "sd35-medium", "flux-dev"])
def test_a_listing_of_a_whole_file_at_real_width_is_recognised_and_claimed(name):
    family, _, config, _ = PUBLISHED[name]
    autoencoder_prefix = "vae." if family is flux.FAMILY else VAE
    shapes = {MODEL + key: shape for key, shape in real_shapes(name).items()}
    with torch.device("meta"):
        spec = compvis.BARE_AUTOENCODER
        vae = spec.read(VAE_16, "config.json")
        weights = spec.build(vae).state_dict()
        shapes |= {
            autoencoder_prefix + key: tuple(tensor.shape)
            for key, tensor in as_original(spec.original_names(vae, weights), weights).items()
        }
        for alias in ("clip_l", "t5xxl") if family is flux.FAMILY else ENCODERS:
            weights = ENCODERS[alias].build().state_dict()
            weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
            origins = {key: ENCODERS[alias].original_name(f"text_encoders.{alias}.", key) for key in weights}
            shapes |= {origin.key: tuple(weights[key].shape) for key, origin in origins.items()}
    shapes["text_encoders.clip_l.logit_scale"] = ()
    found = recognise(Listing(shapes), None)
    assert found.denoiser == family.denoiser.read(config, "config.json")
    assert (found.family, found.autoencoder.denoiser_channels, found.autoencoder.force_upcast) == (family, 16, True)
    claims = claim_single_file(found, shapes, name)
    claimed = [(origin.key, origin.third, origin.rows) for origins in claims.values() for origin in origins.values()]
    assert len(claimed) == len(set(claimed))
    assert {key for key, _, _ in claimed} == shapes.keys() - {"text_encoders.clip_l.logit_scale"}


def test_the_references_conversion_of_text_encoders_gives_our_weights():
    encoders = [
        ClipEncoder(component="a", tokenizer="", alias="clip_g", projection=True),
        T5Encoder(component="b", tokenizer="", alias="t5xxl"),
    ]
    references = [
        CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=2, hidden_act="gelu")),
        T5EncoderModel(T5Config(**T5_XXL | {"num_layers": 1, "d_ff": 8, "d_kv": 1, "vocab_size": 9, "d_model": 8})),
    ]
    for encoder, reference in zip(encoders, references, strict=True):
        prefix = f"text_encoders.{encoder.alias}."
        weights = {}
        for key, tensor in reference.state_dict().items():
            name = encoder.folder_name(key)
            weights[encoder.original_name(prefix, name).key] = tensor
        if encoder.alias == "clip_g":
            found = convert_ldm_clip_checkpoint(dict(weights), f"{prefix}transformer.")
        else:
            found = convert_sd3_t5_checkpoint_to_diffusers(weights)
        expected = {key.removeprefix("text_model."): tensor for key, tensor in reference.state_dict().items()}
        found = {key.removeprefix("text_model."): tensor for key, tensor in found.items()}
        expected.pop("encoder.embed_tokens.weight", None)  # the shared weight by its other name
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_references_conversion_of_the_autoencoder_gives_our_weights():
    spec = compvis.BARE_AUTOENCODER
    config = spec.read(VAE_16, "config.json")
    with torch.device("meta"):
        network = spec.build(config)
    weights = marked({key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})
    originals = {
        VAE + key: tensor for key, tensor in as_original(spec.original_names(config, weights), weights).items()
    }
    found = convert_ldm_vae_checkpoint(originals, VAE_16)
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(found[key].reshape(tensor.shape), tensor), key


def load(spec: ModelSpec) -> Engine:
    return Engine.load(dataclasses.replace(spec, safety="none"), device="cpu", dtype="float32", batch_size=4)


def pictures(spec: ModelSpec) -> np.ndarray:
    engine = load(spec)
    rows = [dataclasses.replace(row, sampler="euler", num_inference_steps=1) for row in requests(32)]
    results = engine.generate(rows)
    assert [result.error for result in results] == [None] * 4
    return np.stack([result.pixels for result in results])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "sd3": write_sd3(root / "sd3"),
        "sd35-medium": write_sd3(root / "sd35", qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        "sd3 without T5": write_sd3(root / "bare", has_t5=False),
        "flux-dev": write_flux(root / "dev"),
        "flux-schnell": write_flux(root / "schnell", distilled=False, **SCHNELL_SCHEDULER),
    }


SCALES = {
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}


def as_published(folder: Path, scales: dict[str, float]) -> None:
    """The folder's autoencoder scaled as the published one, which no file of weights says."""
    path = folder / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scales}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sd3 without T5", "flux-dev", "flux-schnell"])
def test_a_whole_file_draws_what_its_folder_draws(folders, tmp_path, name):
    folder, kind = folders[name], name.partition("-")[0].partition(" ")[0]
    as_published(folder, SCALES[kind])
    weights = joint_weights(folder, MODEL, "vae." if kind == "flux" else VAE)
    weights["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    weights["text_encoders.clip_l.transformer.text_projection.weight"] = torch.eye(64)
    if "without" not in name:
        weights["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = torch.zeros(1)
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, file)
    spec = ModelSpec(model=str(file), tokenizer=str(folder))
    found, expected = describe_model(spec), describe_model(folder)
    assert (found.family, found.factor, found.max_tokens) == (expected.family, expected.factor, expected.max_tokens)
    assert found.layout.blueprint.denoiser == dataclasses.replace(
        expected.layout.blueprint.denoiser, **({"sample_size": 128} if kind == "sd3" else {})
    )
    assert found.layout.blueprint.scheduler == expected.layout.blueprint.scheduler
    assert np.array_equal(pictures(spec), pictures(ModelSpec(model=str(folder))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prefix", "parts"),
    [
        ("sd35-medium", MODEL, ("transformer", "vae")),
        ("sd3", "", ("transformer",)),
        ("flux-dev", "", ("transformer",)),
        ("flux-schnell", MODEL, ("transformer",)),
    ],
)
def test_what_a_file_does_not_hold_comes_from_the_folder_that_is_named(folders, tmp_path, name, prefix, parts):
    folder = folders[name]
    as_published(folder, SCALES["flux" if "flux" in name else "sd3"])
    file = tmp_path / "alone.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in joint_weights(folder, prefix, VAE, *parts).items()}, file)
    spec = ModelSpec(model=str(file), tokenizer=str(folder))
    assert np.array_equal(pictures(spec), pictures(ModelSpec(model=str(folder))))
    names = set(describe_model(spec).files)
    assert {"alone.safetensors", "text_encoder/model.safetensors", "text_encoder/config.json"} <= names
    assert ("vae/config.json" in names) == ("vae" not in parts)
    assert not any(name.startswith("transformer/") for name in names)


def test_a_file_that_lacks_parts_says_what_to_name(folders, tmp_path):
    file = tmp_path / "alone.safetensors"
    weights = joint_weights(folders["flux-dev"], "", "", "transformer")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, file)
    with pytest.raises(
        EngineError, match=r"Flux.1 dev, its transformer alone, and holds no .* name a diffusers folder"
    ):
        describe_model(ModelSpec(model=str(file)))
    with pytest.raises(EngineError, match="is of stable-diffusion-3; name one of flux as tokenizer"):
        describe_model(ModelSpec(model=str(file), tokenizer=str(folders["sd3"])))
    stray = {**weights, "double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)}
    save_file({key: tensor.contiguous() for key, tensor in stray.items()}, file)
    with pytest.raises(EngineError, match=r"1 unexpected \(first: \['double_blocks.0.img_attn.qkv.scale_weight'\]\)"):
        load(ModelSpec(model=str(file), tokenizer=str(folders["flux-dev"])))


def test_weights_in_fp8_are_widened(folders, tmp_path):
    file = tmp_path / "small.safetensors"
    weights = joint_weights(folders["flux-dev"], "", "", "transformer")
    small = {key: tensor.to(torch.float8_e4m3fn).contiguous() for key, tensor in weights.items()}
    save_file(small, file)
    engine = load(ModelSpec(model=str(file), tokenizer=str(folders["flux-dev"])))
    found = engine._models.denoiser.state_dict()
    assert torch.equal(found["proj_out.weight"], small["final_layer.linear.weight"].float())
    assert not torch.equal(found["proj_out.weight"], weights["final_layer.linear.weight"])


def test_every_key_is_claimed_once(folders):
    for name in ("sd35-medium", "flux-dev"):
        blueprint = dataclasses.replace(
            describe_model(folders[name]).layout.blueprint, denoiser_prefix=MODEL, autoencoder_prefix=VAE
        )
        shapes = {key: tuple(tensor.shape) for key, tensor in joint_weights(folders[name], MODEL, VAE).items()}
        claims = claim_single_file(blueprint, shapes, name)
        claimed = [
            (origin.key, origin.third, origin.rows) for origins in claims.values() for origin in origins.values()
        ]
        assert len(claimed) == len(set(claimed))
        # CLIP's own projection is not in this list of a folder's weights, which its authors' file does not use.
        assert {key for key, _, _ in claimed} == shapes.keys()
