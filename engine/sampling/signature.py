"""What every sampler is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from latentmill.engine.sampling.denoiser import Denoise
from latentmill.engine.sampling.schedule import NoiseSchedule

DrawNoise = Callable[[], Tensor]
"""Fresh standard-normal noise `(n, c, h, w) float32`, each row from its own sample's generator."""

Sampler = Callable[[Denoise, Tensor, NoiseSchedule, int, Tensor, DrawNoise], Tensor]
"""`(denoise, noise (n, c, h, w) float32, schedule, steps, eta (n, 1, 1, 1) float32, draw_noise)` -> latents.

The state keeps the noise's dtype. A sampler draws equally often for every row of a batch.
"""


def refuse_eta(sampler: str, eta: Tensor) -> None:
    """Raises ValueError unless `eta` is 0 in every row."""
    if bool((eta != 0).any()):
        raise ValueError(f"eta must be 0 for {sampler}")
