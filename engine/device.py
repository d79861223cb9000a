"""Where the engine runs and in what precision, and the name of everything that its bits depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentmill.engine.types import PRECISIONS, EngineError


def resolve_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`. Raises EngineError for a device that this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(f"device is {name!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device is {name!r}; the engine runs on cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device is {name!r}, but torch {torch.__version__} sees no CUDA device; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"device is {name!r}, but this machine has {torch.cuda.device_count()}, counted from cuda:0")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or on a GPU also `float16`. Raises EngineError for any other."""
    if name not in PRECISIONS:
        raise EngineError(f"dtype is {name!r}; expected one of {', '.join(PRECISIONS)}")
    if device.type == "cpu" and name == "float16":
        raise EngineError("dtype is 'float16', which the engine runs on a GPU only; use float32 or bfloat16, or a GPU")
    found: torch.dtype = getattr(torch, name)
    return found


@contextmanager
def widened(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the weights of networks in fp32 within the context, then narrow them again, which restores their very bits.

    In place and one tensor at a time: half-precision weights take up to twice their memory, and never three times.
    """
    tensors = [
        tensor
        for network in networks
        for tensor in chain(network.parameters(), network.buffers())
        if tensor.is_floating_point()
    ]
    kinds = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, kind in zip(tensors, kinds, strict=True):
            tensor.data = tensor.data.to(kind)


def execution_class(device: torch.device, dtype: torch.dtype, batch_size: int) -> str:
    """Device model, its libraries and settings, dtype, torch version, thread count and batch size, as one line."""
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        tf32 = cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        where = (
            f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {cudnn.version()}, "
            f"{'TF32' if tf32 else 'no TF32'}"
        )
    else:
        where = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{where}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, batch {batch_size}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
