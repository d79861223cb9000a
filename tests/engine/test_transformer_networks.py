"""Transformers over text and picture: every key and shape of the published configs, and what the references compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from latentmill.engine import EngineError
from latentmill.engine.families import compvis, flux, sd3
from latentmill.engine.families.family import Family
from latentmill.engine.families.t5 import T5Encoder
from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.t5 import T5, T5FeedForward

# Facts of the published model folders.
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
FLUX_SCHNELL = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
FLUX_DEV = {**FLUX_SCHNELL, "guidance_embeds": True}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VAE_16 = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

PUBLISHED: dict[str, tuple[Family, type, dict[str, Any], int]] = {
    "sd3-medium": (sd3.FAMILY, SD3Transformer2DModel, SD3_MEDIUM, 2_028_328_000),
    "sd35-large": (sd3.FAMILY, SD3Transformer2DModel, SD35_LARGE, 8_056_627_520),
    "sd35-medium": (sd3.FAMILY, SD3Transformer2DModel, SD35_MEDIUM, 2_243_171_520),
    "flux-schnell": (flux.FAMILY, FluxTransformer2DModel, FLUX_SCHNELL, 11_891_178_560),
    "flux-dev": (flux.FAMILY, FluxTransformer2DModel, FLUX_DEV, 11_901_408_320),
}


def ours(family: Family, config: dict[str, Any]) -> nn.Module:
    return family.denoiser.build(family.denoiser.read(config, "config.json"))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_at_real_width_the_keys_and_shapes_are_the_published_ones(name):
    family, reference, config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        found, expected = ours(family, config), reference(**config)
    renamed = {family.denoiser.folder_name(key): shape for key, shape in shapes(expected).items()}
    assert shapes(found) == renamed
    # The reference counts no embeddings of places among its parameters.
    assert sum(part.numel() for part in expected.parameters()) == parameters


@pytest.mark.slow
def test_t5_at_real_width_has_every_key_of_the_reference():
    encoder = T5Encoder(component="t5", tokenizer="tokenizer").configured(T5_XXL, "config.json")
    with torch.device("meta"):
        found, expected = encoder.build(), T5EncoderModel(T5Config(**T5_XXL))
    renamed = {encoder.folder_name(key): shape for key, shape in shapes(expected).items()}
    assert shapes(found) == renamed
    assert sum(part.numel() for part in found.parameters()) == 4_762_310_656


@pytest.mark.slow
def test_the_autoencoder_of_16_channels_has_no_convolutions_between_its_halves():
    spec = compvis.AUTOENCODER
    with torch.device("meta"):
        found, expected = spec.build(spec.read(VAE_16, "config.json")), AutoencoderKL(**VAE_16)
    assert shapes(found) == shapes(expected)
    assert not any("quant_conv" in key for key in shapes(found))
    config = VAEConfig.from_dict(VAE_16)
    assert (config.denoiser_channels, config.factor, config.shift_factor) == (16, 8, 0.1159)


def test_half_of_the_convolutions_between_is_refused():
    with pytest.raises(EngineError, match="use_post_quant_conv=False"):
        VAEConfig.from_dict({**VAE_16, "use_quant_conv": True})


NARROW = {"num_attention_heads": 2, "num_layers": 3, "joint_attention_dim": 24, "pooled_projection_dim": 20}
SMALL_SD3 = {**SD3_MEDIUM, **NARROW, "caption_projection_dim": 128, "pos_embed_max_size": 12, "in_channels": 4}
SMALL_FLUX = {**FLUX_DEV, **NARROW, "num_single_layers": 2, "in_channels": 16}
SMALL = {
    "sd3": (sd3.FAMILY, SD3Transformer2DModel, SMALL_SD3),
    "sd35-medium": (
        sd3.FAMILY,
        SD3Transformer2DModel,
        {**SMALL_SD3, "qk_norm": "rms_norm", "dual_attention_layers": [0, 2]},
    ),
    "flux-dev": (flux.FAMILY, FluxTransformer2DModel, SMALL_FLUX),
}


@pytest.mark.parametrize("size", [(24, 10), (6, 22)])
@pytest.mark.parametrize("name", SMALL)
def test_it_computes_what_the_reference_computes(name, size):
    family, kind, config = SMALL[name]
    torch.manual_seed(1)
    reference = kind(**config).eval()
    for weight in reference.parameters():
        # Gates and norms as trained ones are: neither all alike nor near 0.
        weight.data += 0.1 * torch.randn(weight.shape)
    found = ours(family, config).eval()
    found.load_state_dict(reference.state_dict())
    height, width = size
    latents, timesteps = torch.randn(2, 4, height, width), torch.tensor([3.0, 998.25])
    context, pooled, guidance = torch.randn(2, 11, 24), torch.randn(2, 20), torch.tensor([1.0, 7.5])
    with torch.no_grad():
        if family is flux.FAMILY:
            from diffusers import FluxPipeline as Pipeline

            packed = Pipeline._pack_latents(latents, 2, 4, height, width)
            places = Pipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32)
            tokens = reference(
                packed,
                context,
                pooled,
                timesteps / 1000,
                img_ids=places,
                txt_ids=torch.zeros(11, 3),
                guidance=guidance,
            ).sample
            expected = Pipeline._unpack_latents(tokens, height * 8, width * 8, 8)
            result = found(latents, timesteps, context, pooled=pooled, guidance=guidance)
        else:
            expected = reference(latents, context, pooled, timesteps).sample
            result = found(latents, timesteps, context, pooled=pooled)
    assert expected.std() > 0.1
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


def small_t5(length: int = 300) -> tuple[T5, T5EncoderModel, torch.Tensor]:
    torch.manual_seed(2)
    config = {**T5_XXL, "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    encoder = T5Encoder(component="t5", tokenizer="tokenizer").configured(config, "config.json")
    reference = T5EncoderModel(T5Config(**config)).eval()
    network = encoder.build().eval()
    network.load_state_dict({encoder.folder_name(key): tensor for key, tensor in reference.state_dict().items()})
    return network, reference, torch.randint(60, (2, length))


def test_t5_computes_what_the_reference_computes():
    network, reference, ids = small_t5()
    with torch.no_grad():
        found, expected = network(ids), reference(ids).last_hidden_state
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_t5_in_half_precision_stays_finite_where_its_sums_overflow():
    """As the published one's do: there the reference keeps those layers in fp32."""
    network, _, ids = small_t5(20)
    largest = []
    for module in network.modules():
        if isinstance(module, T5FeedForward):
            module.wo.weight.data *= 3e4
            module.register_forward_hook(lambda _module, _given, output: largest.append(float(output.abs().max())))
    with torch.no_grad():
        expected = network(ids)
        half = network.half()(ids)
    assert min(largest) > torch.finfo(torch.float16).max
    assert half.dtype == torch.float16
    assert (half.float() - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_t5_knows_one_weight_by_both_of_its_names():
    encoder = T5Encoder(component="t5", tokenizer="tokenizer")
    assert encoder.folder_name("shared.weight") == encoder.folder_name("encoder.embed_tokens.weight")


@pytest.mark.parametrize(
    ("family", "base", "change", "named"),
    [
        (sd3.FAMILY, SD3_MEDIUM, {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        (sd3.FAMILY, SD3_MEDIUM, {"caption_projection_dim": 99}, "caption_projection_dim=99: expected 1536"),
        (sd3.FAMILY, SD3_MEDIUM, {"dual_attention_layers": [24]}, r"dual_attention_layers=\[24\]"),
        (sd3.FAMILY, SD3_MEDIUM, {"dual_attention_layers": [[1]]}, r"dual_attention_layers=\[\[1\]\]"),
        (sd3.FAMILY, SD3_MEDIUM, {"num_layers": 10**9}, "num_layers=1000000000"),
        (sd3.FAMILY, SD3_MEDIUM, {"num_attention_heads": 30_000}, "attention_head_dim=64: expected a whole number"),
        (flux.FAMILY, FLUX_DEV, {"axes_dims_rope": [16, 56]}, r"axes_dims_rope=\[16, 56\]"),
        (flux.FAMILY, FLUX_DEV, {"patch_size": 2}, "patch_size=2"),
        (flux.FAMILY, FLUX_DEV, {"in_channels": 63}, "in_channels=63: expected a multiple of 4"),
    ],
)
def test_a_field_that_is_not_built_is_refused_by_name(family, base, change, named):
    with pytest.raises(EngineError, match=named):
        family.denoiser.read({**base, **change}, "transformer/config.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"d_model": 1e300}, "d_model=1e"),
        ({"num_heads": -1}, "num_heads=-1"),
    ],
)
def test_a_field_of_t5_that_is_not_built_is_refused_by_name(change, named):
    with pytest.raises(EngineError, match=named):
        T5Encoder(component="t5", tokenizer="tokenizer").configured({**T5_XXL, **change}, "config.json")
