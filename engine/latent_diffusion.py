"""Latent diffusion as the engine runs it: text encoders, a sampler around the denoiser, the autoencoder's decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from latentmill.engine.acceleration import arrange, decode, executed, upload
from latentmill.engine.device import widened
from latentmill.engine.loading.layout import ModelLayout
from latentmill.engine.loading.weights import check_claims, load_autoencoder, load_denoiser
from latentmill.engine.networks.interface import Autoencoder, DenoisingNetwork, ProjectsContext
from latentmill.engine.sampling.denoiser import Denoiser
from latentmill.engine.sampling.samplers import sample
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.text.encoder import TextEncoder
from latentmill.engine.types import GenerationRequest, ModelSpec


@dataclass(frozen=True, slots=True)
class LatentDiffusion:
    """The networks at one precision, the schedule that they were trained on, and the denoiser's further conditions.

    `run` is the denoiser as it is run, by `acceleration.executed`.

    Each sample draws all its noise from its own CPU generator, seeded with its seed.
    """

    text: TextEncoder
    denoiser: nn.Module
    run: Callable[..., Tensor]
    autoencoder: Autoencoder
    schedule: NoiseSchedule
    conditions: Callable[[Tensor, GenerationRequest], Mapping[str, Tensor]] | None

    def batch_key(self, request: GenerationRequest) -> int:
        """Runs of the text encoder that the request takes: the length of its context, which is part of a batch's shape.

        Raises for a prompt that cannot be encoded.
        """
        prompt, negative = map(self.text.chunks_needed, (request.prompt, request.negative_prompt))
        return max(prompt, negative) if request.guided else prompt

    def count_tokens(self, prompt: str) -> int:
        """Tokens before truncation, start and end marks not included."""
        return self.text.count_tokens(prompt)

    @contextmanager
    def in_fp32(self) -> Iterator[LatentDiffusion]:
        """The same weights, widened in place as long as the context lasts."""
        with widened([*self.text.networks, self.denoiser, self.autoencoder]):
            yield replace(self, text=self.text.without_cache(), run=self.denoiser)

    def sample(self, rows: Sequence[GenerationRequest], noise: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Pictures of rows of one loop key and batch key, `(n, 3, h, w) float32 in [0, 1]`; which are finite, `(n,)`.

        `noise` gives each row its draws, `(draws, c, h, w) float32`, in place of its own generator's.
        """
        first, config = rows[0], self.autoencoder.config
        device = next(self.denoiser.parameters()).device
        shape = (config.denoiser_channels, first.height // config.factor, first.width // config.factor)
        draws = _own_draws(rows, shape) if noise is None else iter(torch.stack(list(noise), dim=1))

        def draw_noise() -> Tensor:
            return upload(next(draws), device)

        latents = sample(
            first.sampler,
            self._denoiser(rows, device),
            draw_noise(),
            self.schedule,
            first.num_inference_steps,
            draw_noise,
            _column([row.eta for row in rows], device),
        )
        unscaled = latents / config.scaling_factor + config.shift_factor
        decoded = decode(self.autoencoder, unscaled.to(next(self.autoencoder.parameters()).dtype)).float()
        finite = torch.isfinite(latents).flatten(1).all(1) & torch.isfinite(decoded).flatten(1).all(1)
        return (decoded / 2 + 0.5).clamp(0, 1), finite

    def _denoiser(self, rows: Sequence[GenerationRequest], device: torch.device) -> Denoiser:
        chunks = self.batch_key(rows[0])
        conditioning = self.text.encode([row.prompt for row in rows], chunks)
        guidance = None
        if rows[0].guided:
            negative = self.text.encode_negative([row.negative_prompt for row in rows], chunks)
            conditioning = negative.followed_by(conditioning)
            guidance = _column([row.guidance_scale for row in rows], device)
        network: DenoisingNetwork = self.run
        if isinstance(self.denoiser, ProjectsContext):
            network = partial(network, projected=self.denoiser.project(conditioning.context))
        if self.conditions is not None and conditioning.pooled is not None:
            network = partial(network, **self.conditions(conditioning.pooled, rows[0]))
        return Denoiser(network, self.schedule, conditioning.context, guidance)


def load_latent_diffusion(
    layout: ModelLayout,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    execution: str = "eager",
) -> LatentDiffusion:
    """Load the networks of a diffusers folder or an original single file.

    Raises EngineError for a missing file, a key that does not match, or an unsupported switch.
    """
    check_claims(layout)
    blueprint = layout.blueprint
    autoencoder = load_autoencoder(layout, torch.float32 if blueprint.autoencoder.force_upcast else dtype, device)
    denoiser = arrange(load_denoiser(layout, dtype, device))
    run = executed(denoiser, execution, device)
    text = TextEncoder(layout, spec, dtype, device, batch_size)
    schedule = NoiseSchedule(blueprint.scheduler)
    return LatentDiffusion(text, denoiser, run, arrange(autoencoder), schedule, blueprint.family.conditions)


def _own_draws(rows: Sequence[GenerationRequest], shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Draws of noise `(n, *shape) float32`, as many as are taken, each row from a generator seeded with its seed."""
    generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _column(values: list[float], device: torch.device) -> Tensor:
    """One number per row, shaped to multiply latents: `(n, 1, 1, 1) float32`."""
    return upload(rearrange(torch.tensor(values, dtype=torch.float32), "n -> n 1 1 1"), device)
