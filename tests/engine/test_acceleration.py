"""Memory layouts, precision and slices of decoding: what they promise, and that they change nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentmill.engine import Engine, ModelSpec, acceleration
from latentmill.engine.latent_diffusion import LatentDiffusion, load_latent_diffusion
from latentmill.engine.loading.layout import find_model
from tests.engine.families import write_sdxl


def load(folder: Path, dtype: torch.dtype) -> LatentDiffusion:
    """The networks alone: the engine itself refuses half precision on a CPU."""
    spec = ModelSpec(model=str(folder), safety="none")
    return load_latent_diffusion(find_model(spec), spec, dtype, torch.device("cpu"), batch_size=2)


@pytest.fixture
def largest(engine) -> list[int]:
    """Elements of each layer's output, as the decoder runs."""
    seen: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *passed: seen.append(passed[2].numel()))
        for module in engine._models.autoencoder.modules()
        if not list(module.children())
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def test_a_batch_is_decoded_in_equal_slices_of_bounded_memory(engine, largest, monkeypatch):
    vae = engine._models.autoencoder
    latents = torch.randn(6, vae.config.denoiser_channels, 8, 4)
    whole = acceleration.decode(vae, latents)
    row = max(largest) // 6
    for limit, size in ((6 * row, 6), (5 * row, 3), (2 * row, 2), (row // 2, 1)):
        largest.clear()
        monkeypatch.setattr(acceleration, "DECODE_ELEMENTS", limit)
        decoded = acceleration.decode(vae, latents)
        assert max(largest) == size * row
        assert len(largest) % (6 // size) == 0
        assert torch.allclose(decoded, whole, atol=1e-5)


@torch.inference_mode()
def test_channels_last_changes_the_layout_and_not_the_picture(eps_model):
    plain, arranged = load(eps_model, torch.float32), load(eps_model, torch.float32)
    acceleration.arrange(arranged.denoiser, torch.device("cuda"))
    acceleration.arrange(arranged.autoencoder, torch.device("cuda"))
    assert arranged.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, plain.denoiser.config.context_dim)
    timesteps = torch.tensor([10, 700])
    expected, found = (models.denoiser(latents, timesteps, context) for models in (plain, arranged))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    expected, found = (models.autoencoder.decode(latents) for models in (plain, arranged))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_float32_means_float32_on_every_device(eps_model):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        Engine.load(ModelSpec(model=str(eps_model), safety="none"), device="cpu", dtype="float32", batch_size=1)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_weights_that_are_to_stay_in_fp32_never_pass_through_half(tmp_path):
    folder = write_sdxl(tmp_path / "sdxl")
    models = load(folder, torch.float16)
    stored = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    found = models.autoencoder.state_dict()
    assert models.denoiser.conv_in.weight.dtype == torch.float16
    assert any(not torch.equal(tensor, tensor.half().float()) for tensor in stored.values()), "nothing could be lost"
    assert all(torch.equal(found[key], tensor) for key, tensor in stored.items())


def test_a_retry_widens_the_weights_in_place_and_gives_their_bits_back(eps_model):
    models = load(eps_model, torch.float16)
    networks = [*models.text.networks, models.denoiser, models.autoencoder]
    before = [{key: tensor.clone() for key, tensor in network.state_dict().items()} for network in networks]
    with torch.inference_mode():
        half = models.text.encode(["a cat"]).context
    with models.in_fp32() as wide:
        assert (wide.denoiser, wide.autoencoder) == (models.denoiser, models.autoencoder), "no copies"
        assert {tensor.dtype for network in networks for tensor in network.parameters()} == {torch.float32}
        with torch.inference_mode():
            assert wide.text.encode(["a cat"]).context.dtype == torch.float32
    for network, tensors in zip(networks, before, strict=True):
        assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in tensors.items())
    with torch.inference_mode():
        assert torch.equal(models.text.encode(["a cat"]).context, half)
