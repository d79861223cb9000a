"""What both stages share: checkpoints that survive a kill, running averages, learning rate, contact sheets."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from training.devices import device
from training.parallel import agree
from training.scenes import Pixels

DEFAULT_WORK = Path(__file__).resolve().parent / ".cache"


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a kill at any moment leaves either the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(dict(content), temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None if there is none."""
    if not path.is_file():
        return None
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def learning_rate(progress: float, peak: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Linear warm-up, constant to 60 %, cosine to `floor * peak`; `progress` in [0, 1] of the time budget."""
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    tail = min(max((progress - 0.6) / 0.4, 0.0), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * tail)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Clock:
    """Seconds of training: of the processor where there is no GPU, so that a pause or a busy machine costs nothing."""

    def __init__(self, elapsed: float = 0.0, wall: float = 0.0) -> None:
        self.elapsed, self.wall = elapsed, wall
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        wall = time.monotonic()
        return (wall if device().type == "cuda" else time.process_time()), wall

    def tick(self) -> None:
        """Count what passed since the last call; all processes follow the first one's clock."""
        now = self._now()
        self.elapsed = agree(self.elapsed + now[0] - self._last[0])
        self.wall += now[1] - self._last[1]
        self._last = now


class Curve:
    """Figures of the steps, their means written as one line of JSON now and then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[float | Tensor]] = {}

    def add(self, figures: Mapping[str, float | Tensor]) -> None:
        """Figures of one step; those on a GPU stay there until they are written, since asking for one waits for it."""
        for name, value in figures.items():
            self.values.setdefault(name, []).append(value)

    def write(self, step: int, clock: Clock) -> str:
        """Write the means since the last call; returns them for the progress line."""
        means = {name: sum(map(float, values)) / len(values) for name, values in self.values.items()}
        self.values.clear()
        row = {"step": step, "minutes": round(clock.elapsed / 60, 2), "wall": round(clock.wall / 60, 2), **means}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return " ".join(f"{name}={value:.4f}" for name, value in means.items())


class RunningAverage:
    """Exponential moving average of a module's parameters, with a short memory while it is young."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        state = module.state_dict()
        pairs = [(self.values[name], state[name]) for name in self.values if state[name].is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in pairs], [theirs.detach() for _, theirs in pairs], 1 - decay)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "values": self.values}

    def load(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


def to_tensor(pictures: list[Pixels] | Tensor) -> Tensor:
    """uint8 pictures, also stacked as (n, h, w, 3) -> (n, 3, h, w) float32 in [-1, 1], on the device where they are."""
    stacked = pictures if isinstance(pictures, Tensor) else torch.from_numpy(np.stack(pictures))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_pictures(tensor: Tensor) -> list[Pixels]:
    """(n, 3, h, w) about [-1, 1] -> uint8 pictures (h, w, 3)."""
    scaled = tensor.detach().float().clamp(-1, 1).add(1.0).mul(127.5).round()
    return list(scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def contact_sheet(pictures: list[Pixels], path: Path, columns: int = 8, cell: int = 160) -> None:
    """Write the pictures as one PNG, row by row."""
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index, picture in enumerate(pictures):
        small = Image.fromarray(picture).resize((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(small, (index % columns * cell, index // columns * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
