"""The engine: requests in, pictures with verdicts out, at one fixed batch shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from latentmill.engine import acceleration
from latentmill.engine.device import execution_class, resolve_device, resolve_dtype
from latentmill.engine.encoding import check_strength, read_images
from latentmill.engine.guards.safety import SafetyChecker, judge, load_safety_checker
from latentmill.engine.latent_diffusion import load_latent_diffusion
from latentmill.engine.loading.describe import ModelDescription, describe_model
from latentmill.engine.loras import merged_loras
from latentmill.engine.model import Drawn, Model
from latentmill.engine.sampling.table import SAMPLERS_WITH_ETA
from latentmill.engine.types import (
    PRECISIONS,
    SEED_LIMIT,
    EngineError,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    Pixels,
    Precision,
    UncheckedResult,
)

_MOST_BATCHES = 32
"""Batches of rows that go through the slots of one batch in one go: their prompts are held meanwhile."""


@dataclass(frozen=True, slots=True)
class _Picture:
    """One decoded picture: what the checker sees, rounded, and what is handed on."""

    rounded: Pixels
    kept: Pixels


_Outcome = _Picture | str | None
"""A picture, the reason why there is none, or None where a value was not finite."""


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What came of a request, and the slot that it had in its batch."""

    outcome: _Outcome
    slot: int


_Outcomes = Callable[[], list[_Sampled]]
"""Waits for what comes of requests that the device is working on."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Requests of one shape that the device is working on."""

    requests: list[GenerationRequest]
    noise: list[Tensor] | None
    outcomes: _Outcomes


class Engine:
    """One text-to-image model on one device.

    Every pass runs at `batch_size` rows, padded by repeating rows, so that a row's bits depend on its request and its
    slot alone (on one execution class): not on its neighbours, which may have other samplers and numbers of steps. A
    CPU gives the same bits in every slot; a GPU's convolutions add in another order in some of them.
    Each sample draws all its noise from its own CPU generator, seeded with its seed.
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
        merged: str = "",
    ) -> None:
        self.description = description
        self.batch_size = batch_size
        self.device, self.dtype = device, dtype
        self._cut_pixels = cut_pixels
        self._execution = execution
        self._models = model
        self._safety = safety
        self._merged = merged

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
        `EXECUTIONS`: how the denoiser is run on a GPU. Raises EngineError for a missing
        file, a key that does not match, an unsupported switch, or a missing device.
        """
        if batch_size < 1:
            raise EngineError(f"batch_size is {batch_size}; it must be 1 or more")
        description = describe_model(spec)
        description.check_prompts(spec.prompt_syntax, spec.long_prompts)
        description.check_execution(execution)
        target = resolve_device(device)
        kind = resolve_dtype(dtype, target)
        acceleration.use_full_float32()
        model: Model
        if description.pipeline is None:
            model = load_latent_diffusion(description.layout, spec, kind, target, batch_size, execution)
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
            merged=merged_loras(spec.loras),
        )

    @property
    def execution_class(self) -> str:
        """All that bitwise equality of two runs depends on, besides model and request."""
        where = execution_class(self.device, self.dtype, self.batch_size)
        if self.description.pipeline is None:
            return f"{where}, {acceleration.settings(self._execution)}{self._merged}"
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
        images, requests = read_images(requests), list(requests)
        for index, request in enumerate(requests):
            try:
                self._check_request(request)
                if index in images:
                    requests[index] = replace(request, image=images[index]())
                groups[request.shape, self._models.batch_key(request)].append(index)
            except EngineError as error:
                results[index] = self._unchecked(str(error), request, slot=0)
            except (ValueError, TypeError, OverflowError) as error:
                results[index] = self._unchecked(f"{type(error).__name__}: {error}", request, slot=0)
        most = self.batch_size * (_MOST_BATCHES if self._models.refills else 1)
        runs = [indices[start : start + most] for indices in groups.values() for start in range(0, len(indices), most)]
        begun: tuple[list[int], _Run] | None = None
        for rows in runs:
            given = None if noise is None else [noise[index] for index in rows]
            following = self._begin([requests[index] for index in rows], given)
            # A GPU has the next rows to work on before this thread waits for the last ones.
            if begun is not None:
                results.update(zip(begun[0], self._finish(begun[1]), strict=True))
            begun = rows, following
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
        limit = self.description.max_side
        if limit is not None and max(request.width, request.height) > limit:
            raise EngineError(
                f"size {request.width}x{request.height} has a side of more than {limit}, this model's limit"
            )
        if not 0 <= request.seed < SEED_LIMIT:
            raise EngineError(f"seed {request.seed} is outside 0..{SEED_LIMIT - 1}")
        self.description.check_steps(request.sampler, request.num_inference_steps)
        if request.image is not None:
            self.description.check_images()
        check_strength(request)
        if request.eta != 0 and request.sampler not in SAMPLERS_WITH_ETA:
            raise EngineError(
                f"eta is {request.eta}; it must be 0 for {request.sampler}: it is {', '.join(SAMPLERS_WITH_ETA)}'s"
            )

    def _begin(self, requests: list[GenerationRequest], noise: list[Tensor] | None) -> _Run:
        """Sample and decode requests of one shape and batch key."""
        return _Run(requests, noise, self._sample(requests, noise, self._models))

    def _finish(self, run: _Run) -> list[UncheckedResult]:
        """Wait for a run's pictures; those that are not finite are made again in full precision.

        The run after it has begun by then. Its work comes first on the device, and so do its reads of the weights.
        """
        sampled = run.outcomes()
        broken = [row for row, found in enumerate(sampled) if found.outcome is None]
        retried: dict[int, _Sampled] = {}
        if broken and self.dtype != torch.float32:
            again = None if run.noise is None else [run.noise[row] for row in broken]
            with self._models.in_fp32() as models:
                finished = self._sample([run.requests[row] for row in broken], again, models)()
            retried = dict(zip(broken, finished, strict=True))
        return [
            self._unchecked(
                retried.get(row, found).outcome, request, found.slot, "fp32-retry" if row in retried else None
            )
            for row, (request, found) in enumerate(zip(run.requests, sampled, strict=True))
        ]

    def _unchecked(
        self, outcome: _Outcome, request: GenerationRequest, slot: int, precision: Precision | None = None
    ) -> UncheckedResult:
        """Only a finite picture goes to the checker, which would pass a picture of NaN."""
        used = precision or PRECISIONS[str(self.dtype).removeprefix("torch.")]
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
    def _sample(self, requests: list[GenerationRequest], noise: list[Tensor] | None, models: Model) -> _Outcomes:
        """Begin requests of one shape and batch key. What comes of them, in the same order, is told by the call."""
        try:
            arriving = [self._download(drawn) for drawn in models.sample(requests, self.batch_size, noise)]
        except EngineError as error:
            failed = [_Sampled(str(error), 0)]
            if len(requests) > 1:
                # One row is at fault, and nothing says which: each runs in a batch of its own, at the same shape.
                given = [None] * len(requests) if noise is None else [[row] for row in noise]
                alone = [self._sample([row], own, models)()[0] for row, own in zip(requests, given, strict=True)]
                failed = [replace(found, slot=row % self.batch_size) for row, found in enumerate(alone)]
            return lambda: failed

        def arrived() -> list[_Sampled]:
            found = {row: sampled for part in arriving for row, sampled in part()}
            return [found[row] for row in range(len(requests))]

        return arrived

    def _download(self, drawn: Drawn) -> Callable[[], list[tuple[int, _Sampled]]]:
        """Pictures as whole numbers on their way to the host's memory. The call waits for them."""
        rows, slots = drawn.rows, drawn.slots
        levels = rearrange(drawn.pictures * 255, "n c h w -> n h w c")
        rounded = acceleration.Download(levels.round().to(torch.uint8))
        kept = acceleration.Download(levels.to(torch.uint8)) if self._cut_pixels else rounded
        finite = acceleration.Download(drawn.finite)

        def arrived() -> list[tuple[int, _Sampled]]:
            values = zip(rows, slots, finite.wait(), rounded.wait(), kept.wait(), strict=True)
            return [(row, _Sampled(_Picture(*pair) if good else None, slot)) for row, slot, good, *pair in values]

        return arrived
