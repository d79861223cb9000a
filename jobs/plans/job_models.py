"""The models of a job: the one that it names, or those of an axis, and what they ask of rows together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

from latentmill.engine import EngineError, ModelDescription
from latentmill.jobs.errors import UsageError
from latentmill.jobs.models.choice import ModelChoice, ModelDefaults, resolve_model
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class JobModels:
    """Models that exist and are complete, in the order of their axis.

    `defaults` are those of the first one, with the smallest batch; `notes` says where others suggest something else.
    `steps_fault` says why a sampler cannot take so many steps with one of them, with the nearest number that it can.
    """

    resolved: tuple[ResolvedModel, ...]
    defaults: ModelDefaults
    notes: tuple[str, ...]
    steps_fault: Callable[[str, int], str | None]

    @property
    def factor(self) -> int:
        """What widths and heights are multiples of, whichever model draws them."""
        return math.lcm(*(model.factor for model in self.resolved))

    @property
    def token_limit(self) -> int | None:
        """How many tokens a prompt may have in the model that takes the fewest; None if that is unknown."""
        return min((model.max_tokens - 2 for model in self.resolved if model.max_tokens is not None), default=None)


def find_models(spec: JobSpec, named: Sequence[str]) -> JobModels:
    """The models of an axis, or without `named` ones that of the job. Raises UsageError if one is not usable."""
    if named and spec.revision is not None:
        raise UsageError(f"revision {spec.revision!r} is of one model, and the sweep has an axis of them; leave it out")
    found = [_find(spec, source) for source in named or [spec.model]]
    described = [description for _, _, description in found]
    defaults = [default for _, default, _ in found]
    return JobModels(
        resolved=tuple(model for model, _, _ in found),
        defaults=replace(defaults[0], batch_size=min(default.batch_size for default in defaults)),
        notes=tuple(_other_defaults(spec, named, defaults)),
        steps_fault=_steps_fault(described),
    )


def _find(spec: JobSpec, source: str) -> tuple[ResolvedModel, ModelDefaults, ModelDescription]:
    found = resolve_model(
        ModelChoice(
            source=source,
            revision=spec.revision,
            tokenizer=spec.tokenizer,
            prediction_type=spec.prediction_type,
            timestep_spacing=spec.timestep_spacing,
        )
    )
    try:
        found[2].check_safety(spec.safety)
        found[2].check_prompts(spec.prompt_syntax, spec.long_prompts)
    except EngineError as error:
        raise UsageError(str(error)) from None
    return found


def _other_defaults(spec: JobSpec, named: Sequence[str], defaults: Sequence[ModelDefaults]) -> Iterator[str]:
    """Parameters that nothing gives are the first model's for all: said where another one suggests others."""
    given = {
        name for name in ("width", "height", "num_inference_steps", "guidance_scale", "sampler") if spec.sweep.get(name)
    }
    given |= {name for name in asdict(defaults[0]) if getattr(spec, name) is not None}
    for source, others in zip(named, defaults, strict=False):
        differing = [
            f"{name} {value}"
            for name, value in asdict(others).items()
            if name not in {*given, "batch_size"} and value != getattr(defaults[0], name)
        ]
        if differing:
            yield (
                f"model {source} suggests {', '.join(differing)}, but what is not given is as {named[0]} suggests it; "
                f"to give each its own, pair axes: --zip model,width,height"
            )


def _steps_fault(described: Sequence[ModelDescription]) -> Callable[[str, int], str | None]:
    @cache
    def fault(sampler: str, steps: int) -> str | None:
        try:
            for description in described:
                description.check_steps(sampler, steps)
        except EngineError as error:
            return f"sampler {sampler}: {error}"
        return None

    return fault
