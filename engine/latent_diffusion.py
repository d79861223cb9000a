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
from latentmill.engine.encoding import Starts
from latentmill.engine.loading.layout import ModelLayout
from latentmill.engine.loading.weights import check_claims, load_autoencoder, load_denoiser
from latentmill.engine.loras import Loras, as_conditions, load_loras, scales_of
from latentmill.engine.model import Drawn
from latentmill.engine.networks.interface import Autoencoder, DenoisingNetwork, ProjectsContext
from latentmill.engine.sampling.denoiser import Denoiser
from latentmill.engine.sampling.samplers import begin as begin_sampler
from latentmill.engine.sampling.schedule import NoiseSchedule
from latentmill.engine.sampling.slots import Finished, run_in_slots
from latentmill.engine.sampling.solvers import Solver
from latentmill.engine.text.encoder import TextEncoder
from latentmill.engine.types import EngineError, GenerationRequest, ModelSpec


@dataclass(frozen=True, slots=True)
class LatentDiffusion:
    """The networks at one precision, the schedule that they were trained on, and the denoiser's further conditions.

    `run` is the denoiser as it is run, by `acceleration.executed`. A `distilled` one is told the guidance scale.

    Each sample draws all its noise from its own CPU generator, seeded with its seed.
    """

    text: TextEncoder
    loras: Loras
    denoiser: nn.Module
    run: Callable[..., Tensor]
    autoencoder: Autoencoder
    schedule: NoiseSchedule
    conditions: Callable[[Tensor, GenerationRequest], Mapping[str, Tensor]] | None
    distilled: bool = False

    def batch_key(self, request: GenerationRequest) -> int:
        """Runs of the text encoder that the request takes: the length of its context, which is part of a batch's shape.

        Raises for a prompt that cannot be encoded, and for a negative one where guidance is an input of the network.
        """
        self.loras.of(request)
        if self.distilled and request.negative_prompt:
            raise EngineError("this model was distilled for guidance: it takes no negative prompt; leave it out")
        prompt, negative = map(self.text.chunks_needed, (request.prompt, request.negative_prompt))
        return max(prompt, negative) if request.guided else prompt

    def count_tokens(self, prompt: str) -> int:
        """Tokens before truncation, start and end marks not included."""
        return self.text.count_tokens(prompt)

    @contextmanager
    def in_fp32(self) -> Iterator[LatentDiffusion]:
        """The same weights, widened in place as long as the context lasts."""
        with widened([*self.text.networks, self.denoiser, self.autoencoder]):
            yield replace(self, text=self.text.without_cache(), run=self.loras.around(self.denoiser))

    @property
    def refills(self) -> bool:
        """Rows with loops of their own share a batch, and follow one another in its slots."""
        return True

    def sample(
        self, rows: Sequence[GenerationRequest], slots: int, noise: Sequence[Tensor] | None = None
    ) -> Iterator[Drawn]:
        """Pictures of rows of one shape and batch key, in batches of `slots` as they get done.

        `noise` gives each row its draws, `(draws, c, h, w) float32`, in place of its own generator's.
        """
        config, device = self.autoencoder.config, next(self.denoiser.parameters()).device
        shape = (config.denoiser_channels, rows[0].height // config.factor, rows[0].width // config.factor)

        starts = Starts(self.autoencoder, rows, device)

        def begin(places: list[int]) -> Solver:
            draws = [_own_draws(rows[place], shape) if noise is None else iter(noise[place]) for place in places]

            def draw_noise() -> Tensor:
                return upload(torch.stack([next(draw) for draw in draws]), device)

            first, etas = rows[places[0]], [rows[place].eta for place in places]
            steps = first.num_inference_steps
            start = None if first.image is None else starts.of(places, first.loop[-1], draw_noise)
            return begin_sampler(first.sampler, draw_noise(), self.schedule, steps, draw_noise, etas, start)

        loops = [row.loop for row in rows]
        ready: list[Finished] = []
        for finished in run_in_slots(loops, slots, begin, self._condition(rows, device)):
            ready += finished
            while len(ready) >= slots:
                yield self._decode(ready[:slots], slots)
                del ready[:slots]
        if ready:
            yield self._decode(ready, slots)

    def _condition(self, rows: Sequence[GenerationRequest], device: torch.device) -> Callable[[list[int]], Denoiser]:
        """What makes the denoiser of some of the rows; all their prompts are encoded here, in full batches."""
        chunks = self.batch_key(rows[0])
        loras = [self.loras.of(row) for row in rows]
        positive = self.text.encode([row.prompt for row in rows], chunks, loras)
        guided = rows[0].guided and not self.distilled
        negative = self.text.encode_negative([row.negative_prompt for row in rows], chunks, loras) if guided else None

        def condition(places: list[int]) -> Denoiser:
            conditioning, guidance = positive.take(places), None
            counting = [loras[place] for place in places]
            if negative is not None:
                conditioning = negative.take(places).followed_by(conditioning)
                guidance = _column([rows[place].guidance_scale for place in places], device)
                counting += counting
            scales = scales_of(counting, device)
            network: DenoisingNetwork = partial(self.run, **as_conditions(scales)) if scales else self.run
            if isinstance(self.denoiser, ProjectsContext):
                with self.loras.switchboard.holding(scales):
                    network = partial(network, projected=self.denoiser.project(conditioning.context))
            if self.conditions is not None and conditioning.pooled is not None:
                network = partial(network, **self.conditions(conditioning.pooled, rows[0]))
            if self.distilled:
                told = torch.tensor([rows[place].guidance_scale for place in places], dtype=torch.float32)
                network = partial(network, guidance=upload(told, device))
            return Denoiser(network, self.schedule, conditioning.context, guidance)

        return condition

    def _decode(self, done: Sequence[Finished], slots: int) -> Drawn:
        """The pictures of rows that are done, at the shape of a whole batch."""
        config, dtype = self.autoencoder.config, next(self.autoencoder.parameters()).dtype
        padded = [*done, *[done[-1]] * (slots - len(done))]
        latents = torch.stack([row.latents for row in padded])
        decoded = decode(self.autoencoder, (latents / config.scaling_factor + config.shift_factor).to(dtype)).float()
        finite = torch.isfinite(latents).flatten(1).all(1) & torch.isfinite(decoded).flatten(1).all(1)
        pictures = (decoded / 2 + 0.5).clamp(0, 1)
        count = len(done)
        return Drawn([row.row for row in done], [row.slot for row in done], pictures[:count], finite[:count])


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
    denoiser = load_denoiser(layout, dtype, device)
    loras = Loras(spec.loras, reads_tags=spec.prompt_syntax == "a1111")
    text = TextEncoder(layout, spec, dtype, device, batch_size, loras)
    networks = dict(zip([encoder.component for encoder in blueprint.encoders], text.networks, strict=True))
    adapted = load_loras(layout, {**networks, blueprint.family.denoiser.component: denoiser}, loras)
    text.adapted_by(name for component in networks for name in adapted.get(component, ()))
    run = executed(loras.around(arrange(denoiser)), execution, device)
    return LatentDiffusion(
        text=text,
        loras=loras,
        denoiser=denoiser,
        run=run,
        autoencoder=arrange(autoencoder),
        schedule=NoiseSchedule(blueprint.scheduler, blueprint.denoiser.patch_size),
        conditions=blueprint.family.conditions,
        distilled=blueprint.denoiser.distilled_guidance,
    )


def _own_draws(row: GenerationRequest, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Draws of noise `(*shape) float32`, as many as are taken, from a generator seeded with the row's seed."""
    generator = torch.Generator("cpu").manual_seed(row.seed)
    while True:
        yield torch.randn(shape, generator=generator)


def _column(values: list[float], device: torch.device) -> Tensor:
    """One number per row, shaped to multiply latents: `(n, 1, 1, 1) float32`."""
    return upload(rearrange(torch.tensor(values, dtype=torch.float32), "n -> n 1 1 1"), device)
