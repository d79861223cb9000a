"""Memory layouts, precision and slices of decoding: what they promise, and that they change nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec, acceleration, graphs
from latentmill.engine.latent_diffusion import LatentDiffusion, load_latent_diffusion
from latentmill.engine.loading.layout import find_model
from tests.engine.families import write_sdxl
from tests.engine.test_transformer_networks import SMALL, ours

pytestmark = pytest.mark.slow


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
        monkeypatch.setitem(acceleration.DECODE_ELEMENTS, "cpu", limit)
        decoded = acceleration.decode(vae, latents)
        assert max(largest) == size * row
        assert len(largest) % (6 // size) == 0
        assert torch.allclose(decoded, whole, atol=1e-5)


@torch.inference_mode()
def test_channels_last_changes_the_layout_and_not_the_picture(eps_model):
    plain, arranged = load(eps_model, torch.float32), load(eps_model, torch.float32)
    plain.denoiser.to(memory_format=torch.contiguous_format)
    plain.autoencoder.to(memory_format=torch.contiguous_format)
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


def test_keys_and_values_of_a_prompt_are_made_once_and_change_no_bit(eps_model, monkeypatch):
    engine = Engine.load(ModelSpec(model=str(eps_model), safety="none"), device="cpu", dtype="float32", batch_size=2)
    unet = engine._models.denoiser
    rows = [
        GenerationRequest(prompt=f"picture {n}", seed=n, width=64, height=64, num_inference_steps=4) for n in range(2)
    ]
    calls: list[int] = []
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2.to_k")]
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    once = engine.generate(rows)
    assert len(calls) == len(layers) > 0
    forward = type(unet).forward

    def projecting(self, x, timesteps, context, projected):
        assert len(projected) == len(layers)
        return forward(self, x, timesteps, context)

    monkeypatch.setattr(type(unet), "forward", projecting)
    calls.clear()
    again = engine.generate(rows)
    assert len(calls) == len(layers) * 5, "once more by `project`, whose results are left out"
    for found, expected in zip(again, once, strict=True):
        assert np.array_equal(found.pixels, expected.pixels)


class Replayed:
    """In place of a CUDA graph: remembers that it was made, and runs its network on what it is given."""

    made = 0

    def __init__(self, call, inputs):
        type(self).made += 1
        self.call = call

    def replay(self, inputs):
        return self.call(inputs)


@torch.inference_mode()
def test_graphs_are_kept_by_shape_and_forgotten_when_the_weights_move(tmp_path, monkeypatch):
    models = load(write_sdxl(tmp_path / "sdxl"), torch.float32)
    unet, config = models.denoiser, models.denoiser.config
    monkeypatch.setattr(graphs, "_Graph", Replayed)
    monkeypatch.setattr(graphs, "_LIMIT", 2)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    run, pooled = graphs.CapturedNetwork(unet), config.projection_input_dim - 6 * config.addition_time_embed_dim

    def batch(side: int) -> int:
        """Two steps of a batch; how many graphs have been made until then."""
        context, extra = torch.randn(2, 77, config.context_dim), {"pooled": torch.randn(2, pooled)}
        extra["time_ids"] = torch.full((2, 6), 64.0)
        projected = unet.project(context)
        for _ in range(2):
            latents, timesteps = torch.randn(2, 4, side, 8), torch.full((2,), 500.0)
            found = run(latents, timesteps, context, projected=projected, **extra)
            assert torch.equal(found, unet(latents, timesteps, context, **extra))
        return Replayed.made

    assert [batch(side) for side in (8, 16, 8, 16)] == [1, 2, 2, 2]
    assert [batch(side) for side in (24, 16, 8)] == [3, 3, 4], "the oldest of two makes room"
    unet.conv_in.weight.data = unet.conv_in.weight.data.clone(memory_format=torch.channels_last)
    assert batch(8) == 5
    assert batch(8) == 5


@torch.inference_mode()
def test_graphs_of_a_network_that_projects_no_context_are_forgotten_too(monkeypatch):
    family, _, config = SMALL["flux-dev"]
    network = ours(family, config)
    monkeypatch.setattr(graphs, "_Graph", Replayed)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Replayed, "made", 0)
    run = graphs.CapturedNetwork(network)

    def batch() -> int:
        context = torch.randn(2, 5, 24)
        extra = {"pooled": torch.randn(2, 20), "guidance": torch.tensor([2.0, 5.0])}
        for _ in range(2):
            latents, timesteps = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0)
            assert torch.equal(run(latents, timesteps, context, **extra), network(latents, timesteps, context, **extra))
        return Replayed.made

    assert [batch(), batch()] == [1, 1]
    network.proj_out.weight.data = network.proj_out.weight.data.clone()
    assert [batch(), batch()] == [2, 2]


@pytest.mark.parametrize(
    ("execution", "reason"),
    [("graphs", "needs a CUDA device; use eager"), ("compiled", "needs a CUDA device"), ("jit", "expected one of")],
)
def test_an_execution_that_a_cpu_does_not_have_is_refused(eps_model, execution, reason):
    with pytest.raises(EngineError, match=reason):
        Engine.load(ModelSpec(model=str(eps_model)), device="cpu", dtype="float32", execution=execution)
