"""The engine: requests in, pictures with verdicts out, at one fixed batch shape."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from engine.denoiser import Denoiser
from engine.describe import ModelDescription, describe_model
from engine.device import execution_class, resolve_device, resolve_dtype
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
from engine.vae import AutoencoderKL
from engine.weights import load_schedule, load_unet, load_vae

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
    vae: AutoencoderKL


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
    ) -> None:
        self.description = description
        self.batch_size = batch_size
        self._models = models
        self._schedule = schedule
        self._safety = safety
        parameter = next(models.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @classmethod
    def load(cls, spec: ModelSpec, *, device: str = "cuda", dtype: str = "float16", batch_size: int = 8) -> Engine:
        """Load a diffusers folder and its safety checker.

        Raises EngineError for a missing file, a key that does not match, an unsupported switch, or a device that is
        not there.
        """
        if batch_size < 1:
            raise EngineError(f"batch_size is {batch_size}; it must be 1 or more")
        description = describe_model(spec.model)
        folder = Path(spec.model)
        target = resolve_device(device)
        kind = resolve_dtype(dtype, target)
        vae = load_vae(folder, kind, target)
        if vae.config.force_upcast:
            vae = vae.float()
        models = _Models(TextEncoder(folder, kind, target, batch_size), load_unet(folder, kind, target), vae)
        safety = load_safety_checker(spec, folder, target)
        return cls(models, load_schedule(folder), safety, description, batch_size)

    @property
    def execution_class(self) -> str:
        """All that bitwise equality of two runs depends on, beside model and request."""
        return execution_class(self.device, self.dtype, self.batch_size)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """One result per request, in the same order.

        What is wrong with one request (a prompt that cannot be tokenised, latents that are not finite, a checker that
        raises) is that result's `error`. What is wrong with the machine (memory, a lost device) is raised.
        """
        results: dict[int, GenerationResult] = {}
        groups: dict[tuple[int, int, int, str, bool], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            error = self._reason_to_refuse(request)
            if error is None:
                groups[request.loop_key].append(index)
            else:
                results[index] = self._failure(error, slot=0)
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                results.update(zip(batch, self._run_batch([requests[index] for index in batch]), strict=True))
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
            self._models.text.count_tokens(request.prompt)
            self._models.text.count_tokens(request.negative_prompt)
        except (ValueError, TypeError, OverflowError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _run_batch(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        """Sample, decode and check up to `batch_size` requests of one loop key."""
        precision: Precision = _PRECISION[self.dtype]
        pixels = self._sample(requests, self._models)
        broken = [slot for slot, picture in enumerate(pixels) if picture is None]
        retried: dict[int, Pixels | None] = {}
        if broken and self.dtype != torch.float32:
            retried = dict(zip(broken, self._sample_in_fp32([requests[slot] for slot in broken]), strict=True))
        results = []
        for slot, request in enumerate(requests):
            picture = retried.get(slot, pixels[slot])
            used: Precision = "fp32-retry" if slot in retried else precision
            results.append(self._judge(request, picture, slot, used))
        return results

    def _judge(
        self, request: GenerationRequest, picture: Pixels | None, slot: int, precision: Precision
    ) -> GenerationResult:
        """Only finite pictures come this far to the checker: it would pass a picture of NaN."""
        if picture is None:
            return self._failure(f"latents or pixels were not finite in {precision}", slot, precision)
        try:
            verdict: SafetyVerdict | None = self._safety.check(picture)
        except Exception as error:  # noqa: BLE001 - whatever a checker raises, its picture must not pass
            return self._failure(f"safety checker raised {type(error).__name__}: {error}", slot, precision)
        if verdict is None:
            return self._failure("safety checker gave no verdict", slot, precision)
        return GenerationResult(
            pixels=picture,
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

    def _sample_in_fp32(self, requests: list[GenerationRequest]) -> list[Pixels | None]:
        """Once more, in full precision, for rows that overflowed. The copies live only as long as the call."""
        models = self._models
        in_fp32 = _Models(
            models.text.at_precision(torch.float32),
            copy.deepcopy(models.unet).float(),
            copy.deepcopy(models.vae).float(),
        )
        return self._sample(requests, in_fp32)

    @torch.inference_mode()
    def _sample(self, requests: list[GenerationRequest], models: _Models) -> list[Pixels | None]:
        """Pictures for up to `batch_size` requests of one loop key; None where a value was not finite."""
        rows = requests + requests[-1:] * (self.batch_size - len(requests))
        first = rows[0]
        latent_shape = (
            self.description.latent_channels,
            first.height // self.description.factor,
            first.width // self.description.factor,
        )
        generators = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]

        def draw_noise() -> Tensor:
            return torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators]).to(
                self.device
            )

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
        pictures = (
            rearrange((decoded / 2 + 0.5).clamp(0, 1) * 255, "n c h w -> n h w c").round().to(torch.uint8).cpu().numpy()
        )
        return [picture if good else None for picture, good in zip(pictures, finite.tolist(), strict=True)][
            : len(requests)
        ]

    def _denoiser(self, rows: list[GenerationRequest], models: _Models) -> Denoiser:
        prompts = [row.prompt for row in rows]
        if not rows[0].guided:
            return Denoiser(models.unet, self._schedule, models.text.encode(prompts), None)
        context = models.text.encode([row.negative_prompt for row in rows] + prompts)
        return Denoiser(
            models.unet, self._schedule, context, _column([row.guidance_scale for row in rows], self.device)
        )


def _column(values: list[float], device: torch.device) -> Tensor:
    """One number per row, shaped to multiply latents: `(n, 1, 1, 1) float32`."""
    return rearrange(torch.tensor(values, dtype=torch.float32, device=device), "n -> n 1 1 1")
