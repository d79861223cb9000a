"""The networks have every key and shape of the published configs, and compute what diffusers' networks compute."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet

from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.networks.attention import attend
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.unet import UNet
from latentmill.engine.types import EngineError

pytestmark = pytest.mark.slow

# Facts of the published model folders: only what differs from the reference library's defaults.
SD15_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
SD21_UNET = {
    **SD15_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
}
SDXL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "sample_size": 128,
}
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def with_linear_projections(reference: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The reference's weights with the 1x1 convolutions around its transformers as linear layers, as loading does."""
    return {
        key: tensor.flatten(1) if key.endswith(("proj_in.weight", "proj_out.weight")) else tensor
        for key, tensor in reference.state_dict().items()
    }


@pytest.mark.parametrize(
    ("config", "parameters"), [(SD15_UNET, 859_520_964), (SD21_UNET, 865_910_724), (SDXL_UNET, 2_567_463_684)]
)
def test_unet_at_real_width_has_the_published_keys_and_shapes(config, parameters):
    with torch.device("meta"):
        ours, reference = UNet(UNetConfig.from_dict(config)), ReferenceUNet.from_config(config)
    assert shapes(ours) == {key: tuple(tensor.shape) for key, tensor in with_linear_projections(reference).items()}
    assert sum(tensor.numel() for tensor in ours.parameters()) == parameters


def test_autoencoder_at_real_width_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        ours, reference = AutoencoderKL(VAEConfig.from_dict(SD_VAE)), ReferenceVAE.from_config(SD_VAE)
    assert shapes(ours) == shapes(reference)
    assert VAEConfig.from_dict(SD_VAE).factor == 8
    assert VAEConfig.from_dict(SD_VAE).scaling_factor == 0.18215


@pytest.mark.parametrize("config", [SD15_UNET, SD21_UNET, SDXL_UNET], ids=["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("size", [(16, 16), (24, 8), (18, 14)])
def test_unet_computes_what_the_reference_computes(config, size):
    narrow = {
        **config,
        "block_out_channels": [32 * (width // 320) for width in config["block_out_channels"]],
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "transformer_layers_per_block": [1, 2, 3][: len(config["block_out_channels"])]
        + [1] * (len(config["block_out_channels"]) - 3),
        "projection_class_embeddings_input_dim": 40 + 6 * 256 if "addition_embed_type" in config else None,
    }
    torch.manual_seed(1)
    reference = ReferenceUNet.from_config(narrow).eval()
    ours = UNet(UNetConfig.from_dict(narrow)).eval()
    ours.load_state_dict(with_linear_projections(reference))
    latents, timesteps, context = torch.randn(2, 4, *size), torch.tensor([3, 700]), torch.randn(2, 11, 24)
    pooled, ids = torch.randn(2, 40), torch.tensor([[64.0, 48, 0, 0, 64, 48]] * 2)
    extra = {"pooled": pooled, "time_ids": ids} if "addition_embed_type" in config else {}
    with torch.no_grad():
        expected = reference(
            latents, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids} if extra else None
        ).sample
        found = ours(latents, timesteps, context, **extra)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_autoencoder_computes_what_the_reference_computes():
    narrow = {
        **SD_VAE,
        "block_out_channels": [8, 16, 16],
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    torch.manual_seed(2)
    reference = ReferenceVAE.from_config(narrow).eval()
    ours = AutoencoderKL(VAEConfig.from_dict(narrow)).eval()
    ours.load_state_dict(reference.state_dict())
    pixels, latents = torch.rand(2, 3, 40, 24) * 2 - 1, torch.randn(2, 4, 10, 6)
    with torch.no_grad():
        expected = reference.encode(pixels).latent_dist
        found = ours.encode(pixels)
        assert torch.allclose(found.mean, expected.mean, atol=1e-5)
        assert torch.allclose(found.logvar, expected.logvar, atol=1e-5)
        assert torch.allclose(found.kl(), expected.kl(), rtol=1e-4)
        picture = reference.decode(latents).sample
        assert (ours.decode(latents) - picture).abs().max() <= 1e-4 * picture.abs().max()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim=[8, 8]"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ],
)
def test_a_switch_that_is_not_built_is_refused_by_name(change, named):
    with pytest.raises(EngineError, match=named.replace("[", r"\[").replace("]", r"\]")):
        UNetConfig.from_dict({**SD15_UNET, **change})


def test_attention_in_fp16_stays_finite_where_products_of_queries_and_keys_overflow():
    """Stable Diffusion 2's `upcast_attention` asks for this; the kernels accumulate in fp32 anyway."""
    part = torch.full((1, 3, 64), 400.0) * torch.tensor([1.0, 1.1, 0.9])[None, :, None]
    assert (part @ part.mT).max() > torch.finfo(torch.float16).max
    found = attend(part.half(), part.half(), part.half(), heads=1)
    assert torch.allclose(found.float(), attend(part, part, part, heads=1), rtol=1e-3)
