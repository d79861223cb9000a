"""Guidance and parameterisation around the network, so that a sampler sees one thing: noise and x0, as predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentmill.engine.networks.interface import DenoisingNetwork
from latentmill.engine.sampling.noise_level import NoiseLevel
from latentmill.engine.sampling.schedule import NoiseSchedule


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model predicts from noisy latents: their noise and their x0, each `(n, c, h, w) float32`."""

    noise: Tensor
    x0: Tensor


Denoise = Callable[[Tensor, NoiseLevel], Prediction]
"""`(latents (n, c, h, w) float32 at that level, level)` -> Prediction."""


class Denoiser:
    """The network with its context, classifier-free guidance (arXiv:2207.12598, eq. 6) and parameterisation applied.

    `context` is `(n, l, d)`, or `(2 n, l, d)` with the negative half first where `guidance` is given: a scale per row,
    `(n, 1, 1, 1) float32`. The network runs in the context's dtype; latents and predictions stay float32. Where the
    folder says `clip_sample`, the predicted x0 is clipped, whichever sampler asks; the noise is left as it is.
    """

    def __init__(
        self, network: DenoisingNetwork, schedule: NoiseSchedule, context: Tensor, guidance: Tensor | None
    ) -> None:
        self._network = network
        self._config = schedule.config
        self._context = context
        self._guidance = guidance

    def __call__(self, latents: Tensor, level: NoiseLevel) -> Prediction:
        timesteps = torch.full((len(latents),), float(level.timestep), device=latents.device)
        return self.predict(self.run(latents, timesteps), latents, level)

    def run(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The network's guided output `(n, c, h, w) float32`, for rows at `timesteps (n,)` of their own."""
        inputs = latents.to(self._context.dtype)
        if self._guidance is not None:
            inputs, timesteps = torch.cat([inputs, inputs]), torch.cat([timesteps, timesteps])
        output: Tensor = self._network(inputs, timesteps, self._context).float()
        if self._guidance is None:
            return output
        negative, positive = output.chunk(2)
        return negative + self._guidance * (positive - negative)

    def predict(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> Prediction:
        """What the output of `run` says of noise and x0, for rows at one level."""
        prediction = self._to_prediction(output, latents, level)
        if not self._config.clip_sample:
            return prediction
        limit = self._config.clip_sample_range
        return Prediction(prediction.noise, prediction.x0.clamp(-limit, limit))

    def _to_prediction(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> Prediction:
        """Convert what the model was trained to predict: noise, velocity (arXiv:2202.00512, app. D), x0, or flow.

        Flow is noise less x0 (arXiv:2403.03206, eq. 13), where latents are on the straight line between them.
        """
        signal, noise = level.signal, level.noise
        kind = self._config.prediction_type
        if kind == "epsilon":
            return Prediction(output, (latents - noise * output) / signal)
        if kind == "v_prediction":
            return Prediction(signal * output + noise * latents, signal * latents - noise * output)
        if kind == "flow":
            return Prediction(latents + signal * output, latents - noise * output)
        return Prediction((latents - signal * output) / noise, output)
