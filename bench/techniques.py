"""What each technique of the engine gains on a CPU, beside diffusers on the same weights: `python -m bench.techniques`.

CPU seconds of one thread, 8 pictures of 256 px by the embedded model, all variants in turn; medians of paired ratios.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from latentmill.engine import EMBEDDED_MODEL, ModelSpec, acceleration
from latentmill.engine.latent_diffusion import load_latent_diffusion
from latentmill.engine.loading.layout import find_model

ROWS, ROUNDS = 8, 9
Network = TypeVar("Network", bound=nn.Module)


def paired(title: str, calls: Mapping[str, Callable[[], object]]) -> None:
    """Run every call in every round, and print its median and its ratio to the first one's time of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    first = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratios = sorted(mine / its for mine, its in zip(taken, first, strict=True))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{title:8} {name:44} {statistics.median(taken):.4f} s  {statistics.median(ratios):.3f}  ({spread})")


def plain(network: Network) -> Network:
    """A copy whose convolutions have torch's default layout."""
    copied: Any = copy.deepcopy(network)
    arranged: Network = copied.to(memory_format=torch.contiguous_format)
    return arranged


@torch.inference_mode()
def main() -> None:
    """Print both tables."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.set_num_threads(1)
    spec = ModelSpec(model=str(EMBEDDED_MODEL), safety="none")
    models = load_latent_diffusion(find_model(spec), spec, torch.float32, torch.device("cpu"), ROWS)
    unet: Any = models.denoiser
    vae = models.autoencoder
    their_unet = UNet2DConditionModel.from_pretrained(EMBEDDED_MODEL, subfolder="unet", dtype=torch.float32).eval()
    their_vae = AutoencoderKL.from_pretrained(EMBEDDED_MODEL, subfolder="vae", dtype=torch.float32).eval()
    latents, context = torch.randn(2 * ROWS, 8, 16, 16), torch.randn(2 * ROWS, 77, 128)
    given = (latents, torch.full((2 * ROWS,), 500.0), context)
    projected, plain_unet, plain_vae = unet.project(context), plain(unet), plain(vae)
    decoded = latents[:ROWS]
    paired(
        "U-Net",
        {
            "diffusers": lambda: their_unet(*given),
            "ours, default layout": lambda: plain_unet(*given),
            "ours, channels last": lambda: unet(*given),
            "ours, channels last, keys and values kept": lambda: unet(*given, projected=projected),
        },
    )
    paired(
        "decoder",
        {
            "diffusers": lambda: their_vae.decode(decoded),
            "ours, default layout": lambda: plain_vae.decode(decoded),
            "ours, channels last": lambda: vae.decode(decoded),
            "ours, channels last, in slices": lambda: acceleration.decode(vae, decoded),
        },
    )


if __name__ == "__main__":
    main()
