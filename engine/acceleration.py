"""What makes the engine fast on a device, or keeps it within memory: `settings` names what of it changes bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentmill.engine.graphs import CapturedNetwork
from latentmill.engine.networks.interface import Autoencoder
from latentmill.engine.types import EXECUTIONS, EngineError

Network = TypeVar("Network", bound=nn.Module)

DECODE_ELEMENTS = {"cpu": 2**21, "cuda": 2**29}
"""Largest activation of one decoding pass, by device, unless one picture alone is larger.

On a CPU 8 MiB: larger ones leave the caches, and from 32 MiB on each is mapped afresh, page by page. On a GPU 2 GiB in
float32: 8 pictures of 512 px at once, or 2 of 1024 px. From 2^31 elements on, kernels of torch fail.
"""


def use_full_float32() -> None:
    """Make float32 mean float32: by default cuDNN's convolutions round it to TF32, which has 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def arrange(network: Network) -> Network:
    """Lay the weights of convolutions out as the kernels of CPUs and GPUs read them: channels last."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network


_SHAPES_LIMIT = 64
"""Shapes of batches that one process compiles for. By default torch stops at 8, which is an error."""


def executed(network: nn.Module, execution: str, device: torch.device) -> Callable[..., Tensor]:
    """The network as it is to be run. Raises EngineError for an execution that is not known, or not on this device."""
    if execution not in EXECUTIONS:
        raise EngineError(f"execution is {execution!r}; expected one of {', '.join(EXECUTIONS)}")
    if execution == "eager":
        return network
    if device.type != "cuda":
        raise EngineError(f"execution is {execution!r}, which needs a CUDA device; use eager")
    return CapturedNetwork(network) if execution == "graphs" else compiled(network)


def compiled(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """The network by torch.compile: whole, or an error, and once for each shape."""
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _SHAPES_LIMIT)
    call: Callable[..., Tensor] = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
    return call


def settings(execution: str) -> str:
    """What of this a network's bits depend on, for the execution class."""
    return "channels last, compiled" if execution == "compiled" else "channels last"


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """`vae.decode` in slices of rows, all of one size, so that no row is decoded in a pass of another shape.

    The size follows from the batch's shape, on which bits depend anyway.
    """
    height, width = latents.shape[-2:]
    elements = vae.config.decoder_width * height * width * vae.config.factor**2
    rows, limit = len(latents), DECODE_ELEMENTS[latents.device.type]
    fitting = [size for size in range(1, rows + 1) if rows % size == 0 and size * elements <= limit]
    return torch.cat([vae.decode(part) for part in torch.split(latents, max(fitting, default=1))])


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for what the device is doing."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host. The device goes on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> NDArray[Any]:
        """The tensor's values, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
