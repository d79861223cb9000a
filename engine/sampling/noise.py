"""The original command's noise: one generator for all samples, on the device that samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


class NoiseStream:
    """Standard-normal draws for whole batches, each `shape (n, c, h, w) float32`, from one generator seeded once."""

    def __init__(self, seed: int, shape: Sequence[int], device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._shape = tuple(shape)

    def take(self, kept: int, drawn: int) -> Tensor:
        """Draw `drawn` times and keep the first `kept` of them, by row: `(n, kept, c, h, w)`."""
        draws = [self._draw() for _ in range(kept)]
        for _ in range(drawn - kept):
            self._draw()
        if not draws:
            return torch.empty((self._shape[0], 0, *self._shape[1:]), device=self._generator.device)
        return rearrange(draws, "draws n c h w -> n draws c h w")

    def _draw(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator, device=self._generator.device)
