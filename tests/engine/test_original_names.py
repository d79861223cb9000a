"""At the real widths every key of every published single file is claimed once, with its shape, or ignored by name.

The judge: the original projects' own modules (CompVis/latent-diffusion, Stability-AI/stablediffusion and
generative-models, mlfoundations/open_clip), built elsewhere on torch's meta device from their published configs. Kept
here are the number of their keys and the sha256 of the sorted lines `key shape`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentmill.engine.families import ldm, sd, sdxl
from latentmill.engine.families.clip import ClipEncoder
from latentmill.engine.families.family import Family, TextEncoderSpec
from latentmill.engine.families.ldm import LdmBertEncoder
from latentmill.engine.loading.blueprint import Blueprint
from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.loading.keys import is_ignored, original_names
from latentmill.engine.loading.scheduler_config import SchedulerConfig
from latentmill.engine.loading.single_file import recognise
from latentmill.engine.loading.weights import claim_single_file
from tests.engine.originals import is_convolution
from tests.engine.test_architecture_of_models import SD15_UNET, SD21_UNET, SD_VAE, SDXL_UNET

pytestmark = pytest.mark.slow

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
OPEN_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
LDM_UNET = {**SD15_UNET, "cross_attention_dim": 1280, "sample_size": 32}
VQ_UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [192, 384, 576, 960],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "attention_head_dim": [6, 12, 18, 30],
    "cross_attention_dim": 640,
}
VQ_F4 = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "scaling_factor": 1.0,
}
VQ_F8 = {
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": [*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3],
    "layers_per_block": 2,
    "latent_channels": 4,
    "num_vq_embeddings": 16384,
}


def bert(width: int) -> LdmBertEncoder:
    config = {"d_model": width, "encoder_ffn_dim": 4 * width, "encoder_layers": 32}
    return LdmBertEncoder(config=config, component="bert", tokenizer="tokenizer")


def clip(config: dict, component: str = "text_encoder", *, projection: bool = False) -> ClipEncoder:
    return ClipEncoder(component=component, tokenizer="tokenizer", projection=projection).configured(config, "here")


def blueprint(family: Family, unet: dict, vae: dict, *encoders: TextEncoderSpec) -> Blueprint:
    return Blueprint(
        family=family,
        denoiser=UNetConfig.from_dict(unet),
        autoencoder=VAEConfig.from_dict(vae),
        scheduler=SchedulerConfig.from_dict({}),
        encoders=encoders,
    )


TO_LOGITS = "cond_stage_model.transformer.to_logits."
LAST_LAYER = {
    f"cond_stage_model.model.transformer.resblocks.23.{name}": shape
    for name, shape in {
        "ln_1.weight": (1024,),
        "ln_1.bias": (1024,),
        "attn.in_proj_weight": (3072, 1024),
        "attn.in_proj_bias": (3072,),
        "attn.out_proj.weight": (1024, 1024),
        "attn.out_proj.bias": (1024,),
        "ln_2.weight": (1024,),
        "ln_2.bias": (1024,),
        "mlp.c_fc.weight": (4096, 1024),
        "mlp.c_fc.bias": (4096,),
        "mlp.c_proj.weight": (1024, 4096),
        "mlp.c_proj.bias": (1024,),
    }.items()
}


@dataclass
class Published:
    blueprint: Blueprint
    keys: int
    digest: str
    ignored: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prediction_type: str | None = None


PUBLISHED = {
    "sd1": Published(
        blueprint(sd.FAMILY, SD15_UNET, SD_VAE, clip(CLIP_L)),
        1130,
        "21503364ca61d806acb658b579a19b5a1c418f8496f5647379e151adfab3c318",
    ),
    "sd2": Published(
        blueprint(sd.FAMILY, SD21_UNET, SD_VAE, clip(OPEN_CLIP_H)),
        1228,
        "9ead00576b208d09c432510a038f38fe9255e2771ff6069d377874fdeddcc3a4",
        {
            **LAST_LAYER,
            "cond_stage_model.model.text_projection": (1024, 1024),
            "cond_stage_model.model.logit_scale": (),
        },
        "v_prediction",
    ),
    "sdxl": Published(
        blueprint(
            sdxl.FAMILY,
            SDXL_UNET,
            SD_VAE,
            clip(CLIP_L),
            clip(OPEN_CLIP_G, "text_encoder_2", projection=True),
        ),
        2514,
        "0e7097ed9dccb5ed61425a5c85431991af68b5237dd23b128f6c5c0d992d71eb",
        {"conditioner.embedders.1.model.logit_scale": ()},
    ),
    "ldm-kl": Published(
        blueprint(ldm.FAMILY, LDM_UNET, SD_VAE, bert(1280)),
        1356,
        "fdc7c6078940143e870f78eced5ce7d6defcc516a428585e47087af3c435191a",
        {f"{TO_LOGITS}weight": (30522, 1280), f"{TO_LOGITS}bias": (30522,)},
    ),
    "ldm-vq": Published(
        blueprint(ldm.FAMILY, VQ_UNET, VQ_F4, bert(640)),
        1315,
        "10a13669c360e053e5dfc44bb5aaac83dfb9c4b99ce729f3ee76c45c7c2a2dcd",
        {f"{TO_LOGITS}weight": (30522, 640), f"{TO_LOGITS}bias": (30522,)},
    ),
}


def original_shapes(plan: Blueprint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a single file, from our networks and our table of names."""
    with torch.device("meta"):
        modules = {component: build() for component, build in plan.builders.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for component, module in modules.items():
        ours = {key.removeprefix("text_model."): tuple(part.shape) for key, part in module.state_dict().items()}
        for key, origin in original_names(plan, component, ours).items():
            shape = ours[key]
            if origin.third is not None:
                shape = (3 * shape[0], *shape[1:])
            convolution = len(shape) == 2 and is_convolution(plan, origin.key)
            shape = (*shape, 1, 1) if convolution else shape[::-1] if origin.transposed else shape
            assert shapes.setdefault(origin.key, shape) == shape
    return shapes


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    return hashlib.sha256("\n".join(f"{key} {shapes[key]}" for key in sorted(shapes)).encode()).hexdigest()


@dataclass
class Listing:
    """A checkpoint of which only names and shapes are there."""

    shapes: dict[str, tuple[int, ...]]
    path: Path = Path("listing.safetensors")
    metadata: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_names_and_shapes_are_those_of_the_original_modules(name):
    published = PUBLISHED[name]
    shapes = {**original_shapes(published.blueprint), **published.ignored}
    assert len(shapes) == published.keys
    assert digest(shapes) == published.digest


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_listing_of_the_real_names_is_recognised_and_claimed_whole(name):
    published = PUBLISHED[name]
    shapes = {**original_shapes(published.blueprint), **published.ignored}
    found = recognise(Listing(shapes), published.prediction_type)
    claims = claim_single_file(found, shapes, name)
    claimed = {origin.key for origins in claims.values() for origin in origins.values()}
    assert {key for key in shapes if is_ignored(found, key)} == published.ignored.keys()
    assert claimed == shapes.keys() - published.ignored.keys()
    whole = [origin.key for origins in claims.values() for origin in origins.values() if origin.third is None]
    thirds = [(origin.key, origin.third) for origins in claims.values() for origin in origins.values() if origin.third]
    assert len(whole) == len(set(whole))
    assert len(thirds) == len(set(thirds))
    expected = published.blueprint
    assert [getattr(found.unet, part) for part in ("channels", "heads", "cross_attention", "context_dim")] == [
        getattr(expected.unet, part) for part in ("channels", "heads", "cross_attention", "context_dim")
    ]
    assert original_shapes(found) == original_shapes(expected)


def test_the_codebook_stage_with_attention_has_the_original_names():
    plan = blueprint(ldm.FAMILY, LDM_UNET, VQ_F8, bert(1280))
    shapes = {key: shape for key, shape in original_shapes(plan).items() if key.startswith("first_stage_model.")}
    assert len(shapes) == 299
    assert digest(shapes) == "64bbe90034b0cd28624f9bd3f4fcf5a0bb294d1415d107d7b53990a435c7ba3f"


@pytest.mark.parametrize(
    ("encoder", "reference", "parameters"),
    [
        (clip(CLIP_L), CLIPTextModel, 123_060_480),
        (clip(OPEN_CLIP_H), CLIPTextModel, 340_387_840),
        (clip(OPEN_CLIP_G, projection=True), CLIPTextModelWithProjection, 694_659_840),
    ],
    ids=["clip-l", "open-clip-h", "open-clip-g"],
)
def test_text_encoders_have_their_published_size(encoder, reference, parameters):
    with torch.device("meta"):
        ours, theirs = encoder.build(), reference(CLIPTextConfig(**encoder.config))
    assert {key: part.shape for key, part in ours.state_dict().items()} == {
        key.removeprefix("text_model."): part.shape for key, part in theirs.state_dict().items()
    }
    assert sum(part.numel() for part in ours.parameters()) == parameters


def test_the_encoder_of_latent_diffusion_claims_all_of_the_references_keys_but_its_head():
    with torch.device("meta"):
        ours, theirs = bert(1280).build(), LDMBertModel(LDMBertConfig())
    renamed = {bert(1280).folder_name(key): tuple(part.shape) for key, part in theirs.state_dict().items()}
    renamed.pop(None)
    assert renamed == {key: tuple(part.shape) for key, part in ours.state_dict().items()}
