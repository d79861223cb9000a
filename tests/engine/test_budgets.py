"""What a step and a decode of the embedded model cost, without a clock: operators and FLOPs, held to diffusers'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from latentmill.engine import EMBEDDED_MODEL, Engine, GenerationRequest, ModelSpec, acceleration

pytestmark = pytest.mark.slow

ROWS = 8


@dataclass(frozen=True)
class Cost:
    """Operators that compute or copy, by name, and the FLOPs of one call."""

    operators: Counter[str]
    flops: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def cost(call: Callable[[], object]) -> Cost:
    # Not in inference mode, where composite operators are not taken apart.
    with torch.no_grad(), _Counting() as counting, FlopCounterMode(display=False) as flops:
        call()
    return Cost(counting.seen, flops.get_total_flops())


@pytest.fixture(scope="module")
def engine() -> Engine:
    spec = ModelSpec(model=str(EMBEDDED_MODEL), safety="none")
    return Engine.load(spec, device="cpu", dtype="float32", batch_size=ROWS)


@pytest.fixture(scope="module")
def step(engine: Engine) -> tuple[Cost, Cost]:
    """A guided step of a whole batch: ours, with what is made once a batch already there, and diffusers'."""
    unet = engine._models.denoiser
    theirs = UNet2DConditionModel.from_pretrained(EMBEDDED_MODEL, subfolder="unet", dtype=torch.float32).eval()
    latents, context = torch.randn(2 * ROWS, 8, 16, 16), torch.randn(2 * ROWS, 77, 128)
    timesteps = torch.full((2 * ROWS,), 500.0)
    projected = unet.project(context)
    ours = cost(lambda: unet(latents, timesteps, context, projected=projected))
    return ours, cost(lambda: theirs(latents, timesteps, context))


@pytest.fixture(scope="module")
def decode(engine: Engine) -> tuple[Cost, Cost]:
    """A decode of one slice: ours and diffusers'."""
    theirs = AutoencoderKL.from_pretrained(EMBEDDED_MODEL, subfolder="vae", dtype=torch.float32).eval()
    latents = torch.randn(2, 8, 16, 16)
    ours = cost(lambda: acceleration.decode(engine._models.autoencoder, latents))
    return ours, cost(lambda: theirs.decode(latents))


def operators(found: Cost) -> int:
    return sum(found.operators.values())


def test_a_step_takes_fewer_operators_and_flops_than_the_references(step):
    """The keys and values of the prompt are 7 % of its FLOPs, and were made with the batch."""
    ours, theirs = step
    assert operators(ours) <= 0.9 * operators(theirs), ours.operators
    assert 0 < ours.flops <= 0.94 * theirs.flops


def test_a_decode_takes_fewer_operators_than_the_references_and_no_more_flops(decode):
    ours, theirs = decode
    assert operators(ours) <= 0.9 * operators(theirs), ours.operators
    assert 0 < ours.flops <= theirs.flops


def test_neither_copies_what_it_could_look_at(step, decode):
    """A rearrangement that is no view in this memory layout shows up here."""
    for ours, theirs in (step, decode):
        assert ours.operators["clone"] < theirs.operators["clone"]


@torch.inference_mode()
def test_every_convolution_reads_the_layout_that_its_kernel_wants(engine):
    wrong: list[str] = []

    def look(name: str, convolution: torch.nn.Module) -> Any:
        def hook(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            for what, tensor in (("input", inputs[0]), ("output", output)):
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    wrong.append(f"{name} {what}")

        return convolution.register_forward_hook(hook)

    networks = {"unet": engine._models.denoiser, "decoder": engine._models.autoencoder.decoder}
    hooks = [
        look(f"{network}.{name}", module)
        for network, whole in networks.items()
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    try:
        engine.generate([GenerationRequest(prompt="a", width=256, height=256, num_inference_steps=1)])
    finally:
        for hook in hooks:
            hook.remove()
    # Latents come as the noise is drawn: 8 channels of 16 x 16, which are cheap to lay out anew.
    assert set(wrong) == {"unet.conv_in input", "decoder.conv_in input"}


def test_a_batch_runs_each_network_as_often_as_it_must(engine):
    """One pass a step for both halves of the guidance, one encoding for each text, decoding in slices that fit."""
    runs: Counter[str] = Counter()
    models = engine._models
    parts = {"text": models.text.networks[0], "step": models.denoiser, "decode": models.autoencoder.decoder}
    hooks = [part.register_forward_hook(lambda *_, n=name: runs.update([n])) for name, part in parts.items()]
    try:
        rows = [
            GenerationRequest(
                prompt=f"picture {n % 3}",
                negative_prompt="blurred",
                seed=n,
                width=256,
                height=256,
                num_inference_steps=2,
            )
            for n in range(2 * ROWS)
        ]
        engine.sample(rows)
    finally:
        for hook in hooks:
            hook.remove()
    # Three prompts in one run of the encoder, the negative one in another, and neither again in the second batch.
    assert runs == {"text": 2, "step": 4, "decode": 2 * ROWS // 2}
