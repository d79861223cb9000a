"""The engine: requests in, pictures with verdicts out, at one fixed batch shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor

from latentmill.engine import acceleration
from latentmill.engine.device import execution_class, resolve_device, resolve_dtype
from latentmill.engine.guards.safety import SafetyChecker, judge, load_safety_checker
from latentmill.engine.latent_diffusion import load_latent_diffusion
from latentmill.engine.loading.describe import ModelDescription, describe_model
from latentmill.engine.sampling.table import SAMPLERS_WITH_ETA
from latentmill.engine.types import (
    SEED_LIMIT,
    EngineError,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    Pixels,
    Precision,
    UncheckedResult,
)

_PRECISION: dict[torch.dtype, Literal["fp32", "fp16", "bf16"]] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


class Model(Protocol):
    """Networks that make pictures of requests, at one precision."""

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """What the rows of a batch share beside the loop key. Raises for a request that the model cannot take."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens before truncation, start and end marks not included."""

    def in_fp32(self) -> AbstractContextManager[Model]:
        """The same model in full precision; this one must not be used within the context."""

    def sample(self, rows: Sequence[GenerationRequest], noise: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Pictures of rows that share both keys, `(n, 3, h, w) float32 in [0, 1]`, and which are finite, `(n,)`.

        Raises EngineError if one of the rows is at fault.
        """


@dataclass(frozen=True, slots=True)
class _Picture:
    """One decoded picture: what the checker sees, rounded, and what is handed on."""

    rounded: Pixels
    kept: Pixels


_Outcome = _Picture | str | None
"""A picture, the reason why there is none, or None where a value was not finite."""

_Pictures = Callable[[], list[_Outcome]]
"""Waits for the outcomes of a batch that the device is working on."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests of one batch that the device is working on."""

    requests: list[GenerationRequest]
    noise: list[Tensor] | None
    pictures: _Pictures


class Engine:
    """One text-to-image model on one device.

    Every batch runs at `batch_size` rows, padded by repeating a row, so that a row's bits depend on its request alone
    (on one execution class). Each sample draws all its noise from its own CPU generator, seeded with its seed.
    """

    def __init__(
        self,
        model: Model,
        safety: SafetyChecker,
        description: ModelDescription,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cut_pixels: bool = False,
        execution: str = "eager",
    ) -> None:
        self.description = description
        self.batch_size = batch_size
        self.device, self.dtype = device, dtype
        self._cut_pixels = cut_pixels
        self._execution = execution
        self._models = model
        self._safety = safety

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        *,
        device: str = "cuda",
        dtype: str = "float16",
        batch_size: int = 8,
        cut_pixels: bool = False,
        execution: str = "eager",
    ) -> Engine:
        """Load a diffusers folder or an original single file, and its safety checker.

        Pipelines that are not the engine's own run by the library diffusers, an optional extra. `cut_pixels` truncates
        pixels to whole numbers as the original command did, instead of rounding them. `execution` is one of
        `acceleration.EXECUTIONS`: how the U-Net is run on a GPU. Raises EngineError for a missing
        file, a key that does not match, an unsupported switch, or a missing device.
        """
        if batch_size < 1:
            raise EngineError(f"batch_size is {batch_size}; it must be 1 or more")
        description = describe_model(spec)
        description.check_prompts(spec.prompt_syntax, spec.long_prompts)
        target = resolve_device(device)
        kind = resolve_dtype(dtype, target)
        acceleration.use_full_float32()
        model: Model
        if description.pipeline is None:
            model = load_latent_diffusion(description.layout, spec, kind, target, batch_size, execution)
        elif execution != "eager":
            raise EngineError(f"execution is {execution!r}, but {spec.model} runs by the library diffusers; use eager")
        else:
            from latentmill.engine.diffusers_backend.pipeline import load_pipeline

            model = load_pipeline(description.pipeline, kind, target)
        safety = load_safety_checker(spec, description.folder, target)
        return cls(
            model,
            safety,
            description,
            batch_size,
            device=target,
            dtype=kind,
            cut_pixels=cut_pixels,
            execution=execution,
        )

    @property
    def execution_class(self) -> str:
        """All that bitwise equality of two runs depends on, besides model and request."""
        where = execution_class(self.device, self.dtype, self.batch_size)
        if self.description.pipeline is None:
            return f"{where}, {acceleration.settings(self._execution)}"
        from latentmill.engine.diffusers_backend.pipeline import library_version

        return f"{where}, diffusers {library_version()}"

    def generate(
        self, requests: Sequence[GenerationRequest], *, noise: Sequence[Tensor] | None = None
    ) -> list[GenerationResult]:
        """One result per request, in the same order: `sample`, then `check`.

        A fault of one request (a prompt that cannot be tokenised, latents that are not finite, a checker that raises)
        is that result's `error`. A fault of the machine (memory, a lost device) is raised.
        """
        return self.check(self.sample(requests, noise=noise))

    def check(self, sampled: Sequence[UncheckedResult]) -> list[GenerationResult]:
        """What `sample` gave, each with the verdict on its picture, in the same order.

        May run in any thread, also while another one samples. A picture without a verdict fails.
        """
        return [judge(self._safety, result) for result in sampled]

    def sample(
        self, requests: Sequence[GenerationRequest], *, noise: Sequence[Tensor] | None = None
    ) -> list[UncheckedResult]:
        """One picture per request, in the same order, on its way to `check`. One thread at a time.

        `noise` replaces each request's own generator: its draws `(draws, c, h, w) float32`, in the order in which the
        sampler takes them. Faults are those of `generate`; a picture that is not finite is made again in full precision
        here, before any checker sees it.
        """
        results: dict[int, UncheckedResult] = {}
        groups: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                self._check_request(request)
                groups[*request.loop_key, self._models.batch_key(request)].append(index)
            except EngineError as error:
                results[index] = self._unchecked(str(error), request, slot=0)
            except (ValueError, TypeError, OverflowError) as error:
                results[index] = self._unchecked(f"{type(error).__name__}: {error}", request, slot=0)
        batches = [
            indices[start : start + self.batch_size]
            for indices in groups.values()
            for start in range(0, len(indices), self.batch_size)
        ]
        begun: tuple[list[int], _Batch] | None = None
        for batch in batches:
            given = None if noise is None else [noise[index] for index in batch]
            following = self._begin([requests[index] for index in batch], given)
            # A GPU has the next batch to work on before this thread waits for the last one.
            if begun is not None:
                results.update(zip(begun[0], self._finish(begun[1]), strict=True))
            begun = batch, following
        if begun is not None:
            results.update(zip(begun[0], self._finish(begun[1]), strict=True))
        return [results[index] for index in range(len(requests))]

    def _check_request(self, request: GenerationRequest) -> None:
        """Raises EngineError for a request that this model cannot take."""
        factor = self.description.factor
        if request.width % factor or request.height % factor or min(request.width, request.height) < factor:
            raise EngineError(
                f"size {request.width}x{request.height} is not a multiple of {factor}, as this model needs"
            )
        if not 0 <= request.seed < SEED_LIMIT:
            raise EngineError(f"seed {request.seed} is outside 0..{SEED_LIMIT - 1}")
        self.description.check_steps(request.sampler, request.num_inference_steps)
        if request.eta != 0 and request.sampler not in SAMPLERS_WITH_ETA:
            raise EngineError(
                f"eta is {request.eta}; it must be 0 for {request.sampler}: it is {', '.join(SAMPLERS_WITH_ETA)}'s"
            )

    def _begin(self, requests: list[GenerationRequest], noise: list[Tensor] | None) -> _Batch:
        """Sample and decode up to `batch_size` requests of one loop key and batch key."""
        return _Batch(requests, noise, self._sample(requests, noise, self._models))

    def _finish(self, batch: _Batch) -> list[UncheckedResult]:
        """Wait for a batch's pictures; those that are not finite are made again in full precision.

        The batch after it has begun by then. Its work comes first on the device, and so do its reads of the weights.
        """
        pictures = batch.pictures()
        broken = [slot for slot, picture in enumerate(pictures) if picture is None]
        retried: dict[int, _Outcome] = {}
        if broken and self.dtype != torch.float32:
            again = None if batch.noise is None else [batch.noise[slot] for slot in broken]
            with self._models.in_fp32() as models:
                finished = self._sample([batch.requests[slot] for slot in broken], again, models)()
            retried = dict(zip(broken, finished, strict=True))
        return [
            self._unchecked(retried.get(slot, picture), request, slot, "fp32-retry" if slot in retried else None)
            for slot, (request, picture) in enumerate(zip(batch.requests, pictures, strict=True))
        ]

    def _unchecked(
        self, outcome: _Outcome, request: GenerationRequest, slot: int, precision: Precision | None = None
    ) -> UncheckedResult:
        """Only a finite picture goes to the checker, which would pass a picture of NaN."""
        used = precision or _PRECISION[self.dtype]
        picture = outcome if isinstance(outcome, _Picture) else None
        reason = outcome if isinstance(outcome, str) else f"latents or pixels were not finite in {used}"
        return UncheckedResult(
            judged=None if picture is None else picture.rounded,
            kept=None if picture is None else picture.kept,
            error=reason if picture is None else None,
            prompt_tokens=0 if picture is None else self._models.count_tokens(request.prompt),
            precision=used,
            batch_size=self.batch_size,
            batch_slot=slot,
        )

    @torch.inference_mode()
    def _sample(self, requests: list[GenerationRequest], noise: list[Tensor] | None, models: Model) -> _Pictures:
        """Begin up to `batch_size` requests of one loop key and batch key. The outcomes are those of the call."""
        missing = self.batch_size - len(requests)
        padded_noise = None if noise is None else noise + noise[-1:] * missing
        failed: list[_Outcome]
        try:
            pictures, finite = models.sample(requests + requests[-1:] * missing, padded_noise)
        except EngineError as error:
            failed = [str(error)]
            if len(requests) > 1:
                # One row is at fault, and nothing says which: each runs in a batch of its own, at the same shape.
                given = [None] * len(requests) if noise is None else [[row] for row in noise]
                failed = [self._sample([row], own, models)()[0] for row, own in zip(requests, given, strict=True)]
            return lambda: failed
        levels = rearrange(pictures * 255, "n c h w -> n h w c")
        rounded = acceleration.Download(levels.round().to(torch.uint8))
        kept = acceleration.Download(levels.to(torch.uint8)) if self._cut_pixels else rounded
        arriving = acceleration.Download(finite)

        def arrived() -> list[_Outcome]:
            rows = zip(rounded.wait(), kept.wait(), arriving.wait(), strict=True)
            outcomes: list[_Outcome] = [_Picture(*pair) if good else None for *pair, good in rows]
            return outcomes[: len(requests)]

        return arrived
