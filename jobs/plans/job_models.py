"""The models of a job: the one that it names, or those of an axis, and what they ask of rows together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from latentmill.engine import EngineError, ModelDescription
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.coerce import coerce
from latentmill.jobs.manifests.fields import FIELDS, MODEL
from latentmill.jobs.manifests.manifest import Manifest
from latentmill.jobs.models.cache import is_url
from latentmill.jobs.models.choice import ModelChoice, ModelDefaults, resolve_model
from latentmill.jobs.models.presets import model_place
from latentmill.jobs.models.resolved import ResolvedModel
from latentmill.jobs.spec import JobSpec

MAX_MODELS = 256
"""The most models that rows may name."""

_Found = tuple[ResolvedModel, ModelDefaults, ModelDescription]


@dataclass(frozen=True, kw_only=True)
class JobModels:
    """Models that exist and are complete, in the order of their axis, or as rows name them first.

    `numbers` are their places by the names that rows have for them; `unusable` says why a row cannot have another.

    `defaults` are those of the first one, with the smallest batch; `notes` says where others suggest something else.
    `max_side` is the longest side that all of them take, None if they take any. `steps_fault` says why a sampler cannot
    take so many steps with one of them, with the nearest number that it can. `images_fault` says why one of them cannot
    start from images, or is None.
    """

    resolved: tuple[ResolvedModel, ...]
    numbers: Mapping[str, int]
    unusable: Mapping[str, str]
    defaults: ModelDefaults
    notes: tuple[str, ...]
    max_side: int | None
    steps_fault: Callable[[str, int], str | None]
    images_fault: str | None

    @property
    def first_usable(self) -> ResolvedModel:
        """The one that speaks for all where one is enough: at least one of them is usable."""
        return next(model for model in self.resolved if model.fault is None)

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
            if len(named) < 2 or spec.strict or not _is_there(spec, source):
                raise
            faults[source] = str(error)
    if not found:
        raise UsageError(next(iter(faults.values())))
    usable = list(found.values())
    described = [description for _, _, description in usable]
    defaults = {source: default for source, (_, default, _) in found.items()}
    broken = {source: replace(usable[0][0], source=source, files={}, fault=fault) for source, fault in faults.items()}
    notes = [f"{fault}; its samples will fail (strict refuses such models)" for fault in faults.values()]
    return JobModels(
        resolved=tuple(broken[source] if source in broken else found[source][0] for source in named or found),
        numbers={},
        unusable={},
        defaults=replace(usable[0][1], batch_size=min(default.batch_size for default in defaults.values())),
        notes=(*notes, *_other_defaults(spec, defaults)),
        max_side=_max_side(described),
        steps_fault=_steps_fault(described),
        images_fault=_images_fault(described),
    )


def named_in_rows(manifest: Manifest, default: str) -> tuple[str, ...]:
    """The models that the column of a manifest names, `default` among them where a row names none."""
    names: dict[str, None] = {}
    for source in manifest.sources:
        for batch in source.batches():
            given = batch.columns.get(MODEL)
            found = [None] if given is None else coerce(FIELDS[MODEL], given, {}).unique().to_pylist()
            names |= dict.fromkeys(default if name is None else name for name in found)
            if len(names) > MAX_MODELS:
                raise UsageError(f"the column model names more than {MAX_MODELS} models; split the manifest")
    return tuple(names) or (default,)


def models_of_rows(spec: JobSpec, named: Sequence[str]) -> JobModels:
    """The models that rows name; of those that cannot be used, the reason. Raises UsageError if none is usable."""
    found: dict[str, _Found] = {}
    unusable: dict[str, str] = {}
    for name in named:
        try:
            found[name] = _find(spec if name == spec.model else replace(spec, revision=None), name)
        except UsageError as error:
            unusable[name] = str(error)
    if not found:
        raise UsageError(
            f"none of the models that the column model names is usable: rename it if it means something else; the "
            f"first: {next(iter(unusable.values()))}"
        )
    defaults = {name: default for name, (_, default, _) in found.items()}
    described = [description for _, _, description in found.values()]
    first = next(iter(defaults.values()))
    return JobModels(
        resolved=tuple(model for model, _, _ in found.values()),
        numbers={name: number for number, name in enumerate(found)},
        unusable=unusable,
        defaults=replace(first, batch_size=min(default.batch_size for default in defaults.values())),
        notes=tuple(_other_defaults(spec, defaults)),
        max_side=_max_side(described),
        steps_fault=_steps_fault(described),
        images_fault=_images_fault(described),
    )


def _is_there(spec: JobSpec, source: str) -> bool:
    """Whether a model of that name exists, so that what is wrong is not the name."""
    place = model_place(source)
    if is_url(place) or Path(place).expanduser().exists():
        return True
    plain = replace(spec, lora={}, vae=None, preview_decoder=None)
    if plain == spec:
        return False
    try:  # a hub id, with which something of the job's may not go
        _find(plain, source)
    except UsageError:
        return False
    return True


def _find(spec: JobSpec, source: str) -> _Found:
    found = resolve_model(
        ModelChoice(
            source=source,
            revision=spec.revision,
            tokenizer=spec.tokenizer,
            prediction_type=spec.prediction_type,
            timestep_spacing=spec.timestep_spacing,
            loras=spec.lora,
            vae=spec.vae,
            preview_decoder=spec.preview_decoder,
        )
    )
    try:
        found[2].check_safety(spec.safety)
        found[2].check_prompts(spec.prompt_syntax, spec.long_prompts)
        found[2].check_execution(spec.execution)
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


def _max_side(described: Sequence[ModelDescription]) -> int | None:
    return min((description.max_side for description in described if description.max_side is not None), default=None)


def _images_fault(described: Sequence[ModelDescription]) -> str | None:
    for description in described:
        try:
            description.check_images()
        except EngineError as error:
            return str(error)
    return None


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
