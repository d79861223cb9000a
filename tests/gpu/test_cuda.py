"""The engine on a CUDA device: run by `make test-gpu`, needs torch with CUDA and no Ray, hub or reference library."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from latentmill.engine import EMBEDDED_MODEL, SAMPLERS, Engine, GenerationRequest, ModelSpec, acceleration
from latentmill.engine.graphs import CapturedNetwork
from latentmill.engine.loading.config import UNetConfig, VAEConfig
from latentmill.engine.networks.attention import attend
from latentmill.engine.networks.autoencoder import AutoencoderKL
from latentmill.engine.networks.unet import UNet

pytestmark = pytest.mark.gpu

SPEC = ModelSpec(model=str(EMBEDDED_MODEL), safety="none")
ROWS = [
    GenerationRequest(prompt=prompt, seed=seed, width=256, height=256, num_inference_steps=10, guidance_scale=4.0)
    for seed, prompt in enumerate(
        ["a large red circle in the center on a white background", "a flat icon of a house", ""]
    )
]
SD15 = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768}
SD21 = {
    **SD15,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
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
}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    assert torch.cuda.is_available(), "no CUDA device: these tests are for a machine that has one"


@pytest.fixture(scope="module")
def half() -> Engine:
    return Engine.load(SPEC, device="cuda", dtype="float16", batch_size=4)


def test_half_precision_draws_what_full_precision_on_the_cpu_draws(half):
    full = Engine.load(SPEC, device="cpu", dtype="float32", batch_size=4)
    for ours, reference in zip(half.generate(ROWS), full.generate(ROWS), strict=True):
        assert (ours.status, ours.precision) == ("ok", "fp16")
        assert np.abs(ours.pixels.astype(int) - reference.pixels.astype(int)).mean() < 4


def test_a_rows_bits_do_not_depend_on_its_neighbours(half):
    alone = half.generate(ROWS[:1])[0].pixels
    for order in ([1, 0, 2], [2, 1, 0], [1, 2, 1, 2, 0]):
        together = half.generate([ROWS[number] for number in order])
        assert np.array_equal(together[order.index(0)].pixels, alone)


def test_two_batches_on_their_way_do_not_mix(half):
    """Copies are asynchronous: the pictures and the noise of one batch must outlive the start of the next."""
    rows = [dataclasses.replace(row, sampler="euler_a", seed=10 * n) for n in range(3) for row in ROWS]
    apart = []
    for start in range(0, len(rows), 4):
        apart += half.generate(rows[start : start + 4])
        torch.cuda.synchronize()
    for found, expected in zip(half.generate(rows), apart, strict=True):
        assert np.array_equal(found.pixels, expected.pixels)


def test_memory_that_runs_out_is_raised_and_the_engine_goes_on(half):
    expected = half.generate(ROWS)
    large = [dataclasses.replace(row, width=1024, height=1024, num_inference_steps=1) for row in ROWS]
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 2**26) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            half.generate(large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for found, before in zip(half.generate(ROWS), expected, strict=True):
        assert np.array_equal(found.pixels, before.pixels)


def test_graphs_draw_the_bits_of_eager_mode_before_and_after_a_retry(half, monkeypatch):
    engine = Engine.load(SPEC, device="cuda", dtype="float16", batch_size=4, execution="graphs")
    assert engine.execution_class == half.execution_class
    rows = [dataclasses.replace(row, sampler=sampler) for sampler in ("ddim", "plms", "dpmpp_2m") for row in ROWS]
    expected = [result.pixels for result in half.generate(rows)]
    assert all(map(np.array_equal, [result.pixels for result in engine.generate(rows)], expected))
    forward = AutoencoderKL.decode

    def overflowing(self, latents):
        decoded = forward(self, latents)
        if latents.dtype == torch.float16:
            decoded[0] = torch.inf
        return decoded

    with monkeypatch.context() as patched:
        patched.setattr(AutoencoderKL, "decode", overflowing)
        assert "fp32-retry" in {result.precision for result in engine.generate(rows)}
    assert all(map(np.array_equal, [result.pixels for result in engine.generate(rows)], expected))


def test_compiled_code_draws_almost_the_same_and_says_that_it_is_another_class(half):
    engine = Engine.load(SPEC, device="cuda", dtype="float16", batch_size=4, execution="compiled")
    assert engine.execution_class == f"{half.execution_class}, compiled"
    for found, eager in zip(engine.generate(ROWS), half.generate(ROWS), strict=True):
        assert np.abs(found.pixels.astype(int) - eager.pixels.astype(int)).mean() < 4


@torch.inference_mode()
def test_the_autoencoders_attention_never_holds_all_weights_at_once():
    """One head of 512 features, for which there is no flash kernel: 16384 cells squared would be 1 GiB a row."""
    torch.cuda.reset_peak_memory_stats()
    queries, keys, values = (torch.randn(1, 128 * 128, 512, device="cuda") for _ in range(3))
    before = torch.cuda.memory_allocated()
    attend(queries, keys, values, 1)
    assert torch.cuda.max_memory_allocated() - before < 2**29


@torch.inference_mode()
def test_a_batch_of_eight_at_1024_pixels_is_decoded_in_slices_whose_bits_do_not_depend_on_neighbours():
    acceleration.use_full_float32()  # as the engine does
    with torch.device("cuda"):
        vae = acceleration.arrange(AutoencoderKL(VAEConfig.from_dict(VAE)).eval())
        latents = torch.randn(8, 4, 128, 128)
    torch.cuda.reset_peak_memory_stats()
    decoded = acceleration.decode(vae, latents)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    assert torch.isfinite(decoded).all()
    others = torch.where((torch.arange(8) % 3 == 0).reshape(8, 1, 1, 1).cuda(), latents, latents.flip(0))
    again = acceleration.decode(vae, others)
    assert torch.equal(again[::3], decoded[::3])
    assert not torch.equal(again[1], decoded[1])


@pytest.mark.parametrize("execution", ["eager", "graphs"])
def test_rows_of_all_samplers_have_the_same_bits_mixed_and_apart(execution):
    engine = Engine.load(SPEC, device="cuda", dtype="float16", batch_size=4, execution=execution)
    rows = [
        dataclasses.replace(
            ROWS[0], seed=number, sampler=sampler, num_inference_steps=steps, eta=0.5 * (sampler == "ddim")
        )
        for number, (sampler, steps) in enumerate(itertools.product(SAMPLERS, (3, 8)))
    ]
    random.Random(0).shuffle(rows)
    for row, together in zip(rows, engine.generate(rows), strict=True):
        assert np.array_equal(engine.generate([row])[0].pixels, together.pixels), row


def test_a_row_that_overflows_is_made_again_in_full_precision(half, monkeypatch):
    engine = Engine.load(SPEC, device="cuda", dtype="float16", batch_size=4)
    forward = UNet.forward

    def overflowing(self, latents, *rest, **more):
        output = forward(self, latents, *rest, **more)
        if output.dtype == torch.float16:
            output[1] = torch.inf
        return output

    monkeypatch.setattr(UNet, "forward", overflowing)
    results = engine.generate(ROWS)
    assert [result.precision for result in results] == ["fp16", "fp32-retry", "fp16"]
    assert all(result.status == "ok" for result in results)


@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize(("config", "side"), [(SD15, 64), (SD21, 96), (SDXL, 128)], ids=["sd15", "sd21", "sdxl"])
@torch.inference_mode()
def test_a_real_unet_stays_finite_in_fp16_and_a_row_has_the_same_bits_beside_others_and_in_a_graph(config, side, rows):
    """In its slot: in another one, cuDNN's convolutions may add in another order."""
    torch.cuda.reset_peak_memory_stats()
    parsed = UNetConfig.from_dict(config)
    with torch.device("cuda"):
        unet = acceleration.arrange(UNet(parsed).half().eval())

    def draw() -> dict[str, torch.Tensor]:
        with torch.device("cuda"):
            half = {"dtype": torch.float16}
            found = {"latents": torch.randn(rows, 4, side, side, **half), "timesteps": torch.randint(0, 1000, (rows,))}
            found["context"] = torch.randn(rows, 77, parsed.context_dim, **half)
            if parsed.projection_input_dim:
                found |= {"pooled": torch.randn(rows, 1280, **half), "time_ids": torch.full((rows, 6), 1024.0)}
        return found

    first, other = draw(), draw()
    output = unet(**first)
    assert torch.isfinite(output).all()
    assert torch.equal(unet(**first), output)
    kept = torch.arange(rows, device="cuda") % 2 == 1
    mixed = {
        name: torch.where(kept.reshape(-1, *[1] * (value.ndim - 1)), value, other[name])
        for name, value in first.items()
    }
    beside = unet(**mixed)
    assert torch.equal(beside[1::2], output[1::2]), "a row's bits depend on its neighbours"
    assert not torch.equal(beside[0], output[0])
    graph = CapturedNetwork(unet)
    for _ in range(2):
        found = graph(first["latents"], first["timesteps"], first["context"], **dict(list(first.items())[3:]))
        assert torch.equal(found, output), "a graph has other bits"
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


@pytest.mark.parametrize("side", [64, 96, 128])
def test_a_real_decoder_with_random_weights_stays_finite_in_fp32(side):
    with torch.device("cuda"), torch.inference_mode():
        vae = AutoencoderKL(VAEConfig.from_dict(VAE)).eval()
        assert torch.isfinite(vae.decode(torch.randn(1, 4, side, side))).all()
