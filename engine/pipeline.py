"""The engine: requests in, pictures with verdicts out, at one fixed batch shape."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from engine.denoiser import Denoiser, PredictNoise
from engine.describe import ModelDescription, describe_layout
from engine.device import execution_class, resolve_device, resolve_dtype
from engine.layout import find_model
from engine.safety import SafetyChecker, load_safety_checker
from engine.samplers import SAMPLER_FUNCTIONS
from engine.schedule import NoiseSchedule
from engine.text import TextEncoder
from engine.timesteps import check_steps
from engine.types import (
    SAMPLERS_WITH_ETA,
    SEED_LIMIT,
    EngineError,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    Pixels,
    Precision,
    SafetyVerdict,
)
from engine.unet import UNet
from engine.vae import FirstStage
from engine.weights import check_claims, load_unet, load_vae

_PRECISION: dict[torch.dtype, Literal["fp32", "fp16", "bf16"]] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True, slots=True)
class _Models:
    """The three networks at one precision."""

    text: TextEncoder
    unet: UNet
    vae: FirstStage


@dataclass(frozen=True, slots=True)
class _Picture:
    """One decoded picture: what the checker sees, rounded, and what is handed on."""

    rounded: Pixels
    kept: Pixels


class Engine:
    """One latent diffusion model on one device.

    Every batch runs at `batch_size` rows, padded by repeating a row, so that a row's bits depend on its request alone
    (on one execution class). Each sample draws all its noise from its own CPU generator, seeded with its seed.
    """

    def __init__(
        self,
        models: _Models,
        schedule: NoiseSchedule,
        safety: SafetyChecker,
        description: ModelDescription,
        batch_size: int,
        *,
        cut_pixels: bool = False,
    ) -> None:
        self.description = description
        self.batch_size = batch_size
        self._cut_pixels = cut_pixels
        self._models = models
        self._schedule = schedule
        self._safety = safety
        parameter = next(models.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        *,
        device: str = "cuda",
        dtype: str = "float16",
        batch_size: int = 8,
        cut_pixels: bool = False,
    ) -> Engine:
        """Load a diffusers folder or an original single file, and its safety checker.

        `cut_pixels` cuts pixels to whole numbers as the original command did, instead of rounding them. Raises
        EngineError for a missing file, a key that does not match, an unsupported switch, or a device that is not there.
        """
        if batch_size < 1:
            raise EngineError(f"batch_size is {batch_size}; it must be 1 or more")
        layout = find_model(spec)
        check_claims(layout)
        target = resolve_device(device)
        kind = resolve_dtype(dtype, target)
        vae = load_vae(layout, kind, target)
        if vae.config.force_upcast:
            vae = vae.float()
        models = _Models(TextEncoder(layout, spec, kind, target, batch_size), load_unet(layout, kind, target), vae)
        safety = load_safety_checker(spec, layout.folder, target)
        schedule = NoiseSchedule(layout.blueprint.scheduler)
        return cls(models, schedule, safety, describe_layout(layout), batch_size, cut_pixels=cut_pixels)

    @property
    def execution_class(self) -> str:
        """All that bitwise equality of two runs depends on, beside model and request."""
        return execution_class(self.device, self.dtype, self.batch_size)

    def generate(
        self, requests: Sequence[GenerationRequest], *, noise: Sequence[Tensor] | None = None
    ) -> list[GenerationResult]:
        """One result per request, in the same order.

        `noise` gives each request its draws, `(draws, c, h, w) float32` in the order in which its sampler takes them,
        in place of its own generator's.

        What is wrong with one request (a prompt that cannot be tokenised, latents that are not finite, a checker that
        raises) is that result's `error`. What is wrong with the machine (memory, a lost device) is raised.
        """
        results: dict[int, GenerationResult] = {}
        groups: dict[tuple[int, int, int, str, bool, int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            error = self._reason_to_refuse(request)
            if error is None:
                groups[*request.loop_key, self._chunks(request)].append(index)
            else:
                results[index] = self._failure(error, slot=0)
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                given = None if noise is None else [noise[index] for index in batch]
                finished = self._run_batch([requests[index] for index in batch], given)
                results.update(zip(batch, finished, strict=True))
        return [results[index] for index in range(len(requests))]

    def _reason_to_refuse(self, request: GenerationRequest) -> str | None:
        factor = self.description.factor
        if request.width % factor or request.height % factor or min(request.width, request.height) < factor:
            return f"size {request.width}x{request.height} is not a multiple of {factor}, as this model needs"
        if not 0 <= request.seed < SEED_LIMIT:
            return f"seed {request.seed} is outside 0..{SEED_LIMIT - 1}"
        if request.sampler not in SAMPLER_FUNCTIONS:
            return f"sampler {request.sampler!r} is not one of {', '.join(SAMPLER_FUNCTIONS)}"
        if request.eta != 0 and request.sampler not in SAMPLERS_WITH_ETA:
            return f"eta is {request.eta}; it must be 0 for {request.sampler}: it is {', '.join(SAMPLERS_WITH_ETA)}'s"
        try:
            check_steps(request.sampler, self._schedule.config, request.num_inference_steps)
            self._chunks(request)
        except (ValueError, TypeError, OverflowError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _chunks(self, request: GenerationRequest) -> int:
        """Runs of the text encoder that the request takes: its context's length is part of its batch's shape."""
        needed = self._models.text.chunks_needed
        prompt, negative = needed(request.prompt), needed(request.negative_prompt)
        return max(prompt, negative) if request.guided else prompt

    def _run_batch(self, requests: list[GenerationRequest], noise: list[Tensor] | None) -> list[GenerationResult]:
        """Sample, decode and check up to `batch_size` requests of one loop key."""
        precision: Precision = _PRECISION[self.dtype]
        pictures = self._sample(requests, noise, self._models)
        broken = [slot for slot, picture in enumerate(pictures) if picture is None]
        retried: dict[int, _Picture | None] = {}
        if broken and self.dtype != torch.float32:
            again = None if noise is None else [noise[slot] for slot in broken]
            retried = dict(zip(broken, self._sample_in_fp32([requests[slot] for slot in broken], again), strict=True))
        results = []
        for slot, request in enumerate(requests):
            picture = retried.get(slot, pictures[slot])
            used: Precision = "fp32-retry" if slot in retried else precision
            results.append(self._judge(request, picture, slot, used))
        return results

    def _judge(
        self, request: GenerationRequest, picture: _Picture | None, slot: int, precision: Precision
    ) -> GenerationResult:
        """Only finite pictures come this far to the checker: it would pass a picture of NaN."""
        if picture is None:
            return self._failure(f"latents or pixels were not finite in {precision}", slot, precision)
        try:
            verdict: SafetyVerdict | None = self._safety.check(picture.rounded)
        except Exception as error:  # noqa: BLE001 - whatever a checker raises, its picture must not pass
            return self._failure(f"safety checker raised {type(error).__name__}: {error}", slot, precision)
        if verdict is None:
            return self._failure("safety checker gave no verdict", slot, precision)
        return GenerationResult(
            pixels=picture.kept,
            error=None,
            safety=verdict,
            prompt_tokens=self._models.text.count_tokens(request.prompt),
            precision=precision,
            batch_size=self.batch_size,
            batch_slot=slot,
        )

    def _failure(self, error: str, slot: int, precision: Precision | None = None) -> GenerationResult:
        return GenerationResult(
            pixels=None,
            error=error,
            safety=None,
            prompt_tokens=0,
            precision=precision or _PRECISION[self.dtype],
            batch_size=self.batch_size,
            batch_slot=slot,
        )

    def _sample_in_fp32(self, requests: list[GenerationRequest], noise: list[Tensor] | None) -> list[_Picture | None]:
        """Once more, in full precision, for rows that overflowed. The copies live only as long as the call."""
        models = self._models
        in_fp32 = _Models(
            models.text.at_precision(torch.float32),
            copy.deepcopy(models.unet).float(),
            copy.deepcopy(models.vae).float(),
        )
        return self._sample(requests, noise, in_fp32)

    @torch.inference_mode()
    def _sample(
        self, requests: list[GenerationRequest], noise: list[Tensor] | None, models: _Models
    ) -> list[_Picture | None]:
        """Pictures for up to `batch_size` requests of one loop key; None where a value was not finite."""
        rows = requests + requests[-1:] * (self.batch_size - len(requests))
        first = rows[0]
        latent_shape = (
            self.description.latent_channels,
            first.height // self.description.factor,
            first.width // self.description.factor,
        )
        draws = _own_draws(rows, latent_shape) if noise is None else _given_draws(noise, self.batch_size)

        def draw_noise() -> Tensor:
            return next(draws).to(self.device)

        latents = SAMPLER_FUNCTIONS[first.sampler](
            self._denoiser(rows, models),
            draw_noise(),
            self._schedule,
            first.num_inference_steps,
            _column([row.eta for row in rows], self.device),
            draw_noise,
        )
        config = models.vae.config
        vae_dtype = next(models.vae.parameters()).dtype
        decoded = models.vae.decode((latents / config.scaling_factor + config.shift_factor).to(vae_dtype)).float()
        finite = torch.isfinite(latents).flatten(1).all(1) & torch.isfinite(decoded).flatten(1).all(1)
        levels = rearrange((decoded / 2 + 0.5).clamp(0, 1) * 255, "n c h w -> n h w c")
        rounded = levels.round().to(torch.uint8).cpu().numpy()
        kept = levels.to(torch.uint8).cpu().numpy() if self._cut_pixels else rounded
        return [_Picture(*pair) if good else None for *pair, good in zip(rounded, kept, finite.tolist(), strict=True)][
            : len(requests)
        ]

    def _denoiser(self, rows: list[GenerationRequest], models: _Models) -> Denoiser:
        chunks = self._chunks(rows[0])
        conditioning = models.text.encode([row.prompt for row in rows], chunks)
        guidance = None
        if rows[0].guided:
            negative = models.text.encode_negative([row.negative_prompt for row in rows], chunks)
            conditioning = negative.followed_by(conditioning)
            guidance = _column([row.guidance_scale for row in rows], self.device)
        unet = _with_pooled_text_and_size(models.unet, conditioning.pooled, rows[0])
        return Denoiser(unet, self._schedule, conditioning.context, guidance)


def _with_pooled_text_and_size(unet: UNet, pooled: Tensor | None, request: GenerationRequest) -> PredictNoise:
    """Give SDXL's U-Net what it takes beside the tokens (arXiv:2307.01952, section 2.2): a picture not cropped."""
    if pooled is None:
        return unet
    size = [request.height, request.width]
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=pooled.device)
    return partial(unet, pooled=pooled, time_ids=repeat(time_ids, "1 ids -> n ids", n=len(pooled)))


def _own_draws(rows: list[GenerationRequest], shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """`(n, *shape) float32` of noise without end, each row from a generator that is seeded with the row's seed."""
    generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _given_draws(noise: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    """The rows' given noise, draw by draw, padded like the rows."""
    return iter(torch.stack(noise + noise[-1:] * (batch_size - len(noise)), dim=1))


def _column(values: list[float], device: torch.device) -> Tensor:
    """One number per row, shaped to multiply latents: `(n, 1, 1, 1) float32`."""
    return rearrange(torch.tensor(values, dtype=torch.float32, device=device), "n -> n 1 1 1")
