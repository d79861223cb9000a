"""The models of a job: the one that it names, or those of an axis, and what they ask of rows together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from latentmill.engine import EngineError, ModelDescription
from latentmill.jobs.errors import UsageError
from latentmill.jobs.models.cache import is_url
from latentmill.jobs.models.choice import ModelChoice, ModelDefaults, resolve_model
from latentmill.jobs.models.presets import model_place
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.spec import JobSpec

_Found = tuple[ResolvedModel, ModelDefaults, ModelDescription]


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
    found: dict[str, _Found] = {}
    faults: dict[str, str] = {}
    for source in named or [spec.model]:
        try:
            found[source] = _find(spec, source)
        except UsageError as error:
            if len(named) < 2 or spec.strict or not _is_there(source):
                raise
            faults[source] = str(error)
    if not found:
        raise UsageError(next(iter(faults.values())))
    usable = list(found.values())
    defaults = {source: default for source, (_, default, _) in found.items()}
    broken = {source: replace(usable[0][0], source=source, files={}, fault=fault) for source, fault in faults.items()}
    notes = [f"{fault}; its samples will fail (strict refuses such models)" for fault in faults.values()]
    return JobModels(
        resolved=tuple(broken[source] if source in broken else found[source][0] for source in named or found),
        defaults=replace(usable[0][1], batch_size=min(default.batch_size for default in defaults.values())),
        notes=(*notes, *_other_defaults(spec, defaults)),
        steps_fault=_steps_fault([description for _, _, description in usable]),
    )


def _is_there(source: str) -> bool:
    """Whether a place of that name exists, so that what is wrong is not the name."""
    place = model_place(source)
    return is_url(place) or Path(place).expanduser().exists()


def _find(spec: JobSpec, source: str) -> _Found:
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


def _other_defaults(spec: JobSpec, defaults: Mapping[str, ModelDefaults]) -> Iterator[str]:
    """Parameters that nothing gives are the first model's for all: said where another one suggests others."""
    given = {
        name for name in ("width", "height", "num_inference_steps", "guidance_scale", "sampler") if spec.sweep.get(name)
    }
    first, *_ = defaults
    usual = asdict(defaults[first])
    given |= {name for name in usual if getattr(spec, name) is not None}
    for source, others in defaults.items():
        differing = [
            f"{name} {value}"
            for name, value in asdict(others).items()
            if name not in {*given, "batch_size"} and value != usual[name]
        ]
        if differing:
            yield (
                f"model {source} suggests {', '.join(differing)}, but what is not given is as {first} suggests it; "
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
