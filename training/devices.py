"""Where training runs, and how weights lie there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cv2
import torch
from torch import nn
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
