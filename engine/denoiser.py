"""Guidance and parameterisation around the U-Net, so that a sampler sees one thing: noise and data, as predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.schedule import NoiseSchedule
from engine.unet import UNet


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model makes of noisy latents: the noise in them and the data under it, each `(n, c, h, w) float32`."""

    noise: Tensor
    data: Tensor


Denoise = Callable[[Tensor, int], Prediction]
"""`(latents (n, c, h, w) float32, timestep)` -> Prediction."""


class Denoiser:
    """The U-Net with its context, classifier-free guidance (arXiv:2207.12598, eq. 6) and parameterisation applied.

    `context` is `(n, l, d)`, or `(2 n, l, d)` with the negative half first where `guidance` is given: a scale per row,
    `(n, 1, 1, 1) float32`. The U-Net runs in the context's dtype; latents and predictions stay float32.
    """

    def __init__(self, unet: UNet, schedule: NoiseSchedule, context: Tensor, guidance: Tensor | None) -> None:
        self._unet = unet
        self._schedule = schedule
        self._context = context
        self._guidance = guidance

    def __call__(self, latents: Tensor, timestep: int) -> Prediction:
        return self._to_prediction(self._run_unet(latents, timestep), latents, timestep)

    def _run_unet(self, latents: Tensor, timestep: int) -> Tensor:
        inputs = latents.to(self._context.dtype)
        if self._guidance is not None:
            inputs = torch.cat([inputs, inputs])
        timesteps = torch.full((len(inputs),), timestep, device=inputs.device)
        output: Tensor = self._unet(inputs, timesteps, self._context).float()
        if self._guidance is None:
            return output
        negative, positive = output.chunk(2)
        return negative + self._guidance * (positive - negative)

    def _to_prediction(self, output: Tensor, latents: Tensor, timestep: int) -> Prediction:
        """Convert from what the model was trained to predict: noise, velocity (arXiv:2202.00512, app. D) or data."""
        power = self._schedule.alpha_cumprod(timestep)
        signal, sigma = power**0.5, (1 - power) ** 0.5
        kind = self._schedule.config.prediction_type
        if kind == "epsilon":
            return Prediction(output, (latents - sigma * output) / signal)
        if kind == "v_prediction":
            return Prediction(signal * output + sigma * latents, signal * latents - sigma * output)
        return Prediction((latents - signal * output) / sigma, output)
