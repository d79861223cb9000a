"""Where training runs, in what precision, and how weights lie there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import cv2
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

# Asking whether there is a GPU must not start the driver: processes that are forked afterwards take seconds each.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def renderers() -> int:
    """How many processes draw pictures for one that trains: a core keeps up with itself, and not with a GPU."""
    return os.cpu_count() or 1 if device().type == "cuda" else 0


def drawn_by_others(pictures: Dataset[Any], batch_size: int | None) -> Iterator[Any]:
    """Batches of pictures, drawn by `renderers()` processes that are forked now, or without any by this one.

    Call it before this process starts a GPU's driver: afterwards each fork takes seconds.
    """
    # OpenCV would start a thread for each core in each process; and one that is forked while there are such threads
    # waits for ever for those that it has not.
    cv2.setNumThreads(1)
    return iter(DataLoader(pictures, batch_size=batch_size, num_workers=renderers()))


def place(module: nn.Module) -> None:
    """Move `module` to the device, its weights with channels last: on a CPU that is a tenth faster."""
    layout: dict[str, Any] = {"memory_format": torch.channels_last}  # torch's types do not know it
    module.to(device()).to(**layout)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this is a processor whose matrix unit (AMX) multiplies bfloat16 far faster than float32."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # a torch that lacks it stays with float32
    return device().type == "cpu" and bool(capabilities().get("amx_bf16"))


class _Float32Attention(TorchFunctionMode):
    """Attention alone stays in float32: its backward in bfloat16 takes nearly as long as all else of a step."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **(options or {}))
        with torch.autocast("cpu", enabled=False):
            return function(*(tensor.float() for tensor in arguments), **(options or {}))


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Convolutions and products in bfloat16 where that is faster; the weights themselves stay in float32."""
    if not multiplies_bfloat16():
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _Float32Attention():
        yield
