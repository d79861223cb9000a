"""Where training runs, and how weights lie there."""

from __future__ import annotations

import os
from typing import Any

import cv2
import torch
from torch import nn

# Asking whether there is a GPU must not start the driver: processes that are forked afterwards take seconds each.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def renderers() -> int:
    """How many processes draw pictures for one that trains: a core keeps up with itself, and not with a GPU."""
    return os.cpu_count() or 1 if device().type == "cuda" else 0


def draw_alone(worker: int) -> None:  # noqa: ARG001 - the shape of a loader's hook
    """For a process beside others that draw: OpenCV would start a thread for each core in each of them."""
    cv2.setNumThreads(1)


def place(module: nn.Module) -> None:
    """Move `module` to the device, its weights with channels last: on a CPU that is a tenth faster."""
    layout: dict[str, Any] = {"memory_format": torch.channels_last}  # torch's types do not know it
    module.to(device()).to(**layout)
