"""What makes the engine fast on a device, or keeps it within memory: all of it changes bits, so all of it is here."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from latentmill.engine.networks.interface import Autoencoder

Network = TypeVar("Network", bound=nn.Module)

DECODE_ELEMENTS = 2**29
"""Largest activation of one decoding pass, unless one picture alone is larger: 2 GiB in float32.

Batches up to 8 pictures of 512 px, or 2 of 1024 px, are decoded at once. From 2^31 elements on, kernels of torch fail.
"""


def use_full_float32() -> None:
    """Make float32 mean float32: by default cuDNN's convolutions round it to TF32, which has 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def arrange(network: Network, device: torch.device) -> Network:
    """Lay the weights of convolutions out as the device's kernels read them: on a GPU, channels last."""
    if device.type == "cuda":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network


def settings(device: torch.device) -> str:
    """What of this a network's bits depend on, for the execution class; empty on a CPU."""
    return ", channels last" if device.type == "cuda" else ""


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """`vae.decode` in slices of rows, all of one size, so that a row's bits do not depend on its slot.

    The size follows from the batch's shape, on which bits depend anyway.
    """
    height, width = latents.shape[-2:]
    elements = vae.config.decoder_width * height * width * vae.config.factor**2
    rows = len(latents)
    fitting = [size for size in range(1, rows + 1) if rows % size == 0 and size * elements <= DECODE_ELEMENTS]
    return torch.cat([vae.decode(part) for part in torch.split(latents, max(fitting, default=1))])
