"""What model and job require of a row beyond each field's limits: sizes, samplers, steps, seeds, prompt lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.engine import SAMPLERS_WITH_ETA, SEED_LIMIT
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import Value
from latentmill.jobs.manifests.image_rows import ImageRows
from latentmill.jobs.manifests.prompt_texts import PromptTexts, prompt_texts
from latentmill.jobs.manifests.replacements import FIELDS_WITH_TEXT
from latentmill.jobs.manifests.row_loras import RowLoras
from latentmill.jobs.manifests.tokens import TokenCounter
from latentmill.jobs.manifests.wildcards import WildcardFolder


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What rows are checked against. If an axis gives a parameter, the row's value and the default do not count.

    The axes of each group of `zips` vary together. `factor` and `max_side` are in pixels. `steps_fault` says why a
    sampler cannot take so many steps, or None. `models` numbers those that rows name, `unusable_models` says why others
    cannot be drawn with, and `default_model` is that of rows that name none. `texts` says what is drawn of a row's
    texts. `tokens` is given if long prompts are faults. `loras` says how rows may name LoRAs; `images` is given if they
    may name an image.
    """

    factor: int
    min_pixels: int
    steps_fault: Callable[[str, int], str | None]
    defaults: Mapping[str, Value]
    axes: Mapping[str, tuple[Value, ...]]
    zips: Sequence[Sequence[str]] = ()
    models: Mapping[str, int] = field(default_factory=dict)
    unusable_models: Mapping[str, str] = field(default_factory=dict)
    default_model: str = ""
    texts: PromptTexts = field(default_factory=lambda: prompt_texts("none", WildcardFolder(None), ()))
    tokens: TokenCounter | None = None
    loras: RowLoras = field(default_factory=lambda: RowLoras({}, "plain"))
    images: ImageRows | None = None
    max_side: int | None = None

    @cached_property
    def cases(self) -> list[Rules]:
        """The same rules for each place of zipped axes: only values that meet in a sample need to go together."""
        groups = [[name for name in group if name in _PAIRED] for group in self.zips]
        choices = [set(zip(*(self.axes[name] for name in group), strict=True)) for group in groups if len(group) > 1]
        groups = [group for group in groups if len(group) > 1]
        count = math.prod(map(len, choices))
        if count > MAX_CASES:
            raise UsageError(
                f"zip pairs {count:,} different combinations of size, sampler, steps, eta and strength, the limit is "
                f"{MAX_CASES:,}; use fewer, or put them into the manifest"
            )
        cases = []
        for places in itertools.product(*(sorted(choice, key=str) for choice in choices)):
            axes = dict(self.axes)
            for group, values in zip(groups, places, strict=True):
                axes |= {name: (value,) for name, value in zip(group, values, strict=True)}
            cases.append(replace(self, axes=axes, zips=()))
        return cases

    def fits(self, side: Any) -> Any:
        """Whether the model takes a width or height, or which of an array of them."""
        whole = side % self.factor == 0
        return whole if self.max_side is None else whole & (side <= self.max_side)


Rule = tuple[frozenset[str], NDArray[np.bool_], Any]

MAX_CASES = 1024
_PAIRED = ("width", "height", "sampler", "num_inference_steps", "eta", "strength")
"""The parameters that rules hold against each other."""


def pair_rules(columns: Mapping[str, pa.Array], count: int, rules: Rules) -> Iterator[Rule]:
    """Rules over several fields: each rule's parameters, the rows that break it, and the reason for one row."""
    for case in rules.cases:
        yield from _pair_rules(columns, count, case)


def _pair_rules(columns: Mapping[str, pa.Array], count: int, rules: Rules) -> Iterator[Rule]:

    def bounds(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        if name in rules.axes:
            numbers = [value for value in rules.axes[name] if not isinstance(value, str)]
            return np.full(count, min(numbers)), np.full(count, max(numbers))
        default = rules.defaults[name]
        if name not in columns:
            return np.full(count, default), np.full(count, default)
        values = columns[name].fill_null(default).to_numpy(zero_copy_only=False)
        return values, values

    for name in ("width", "height"):
        if name not in rules.axes:
            values = bounds(name)[0]
            yield frozenset({name}), ~rules.fits(values), lambda i, n=name, v=values: value_fault(n, int(v[i]), rules)
    (width, _), (height, _) = bounds("width"), bounds("height")
    yield (
        frozenset({"width", "height"}),
        width * height < rules.min_pixels,
        lambda i: (
            f"size {width[i]}x{height[i]} is too small for the watermark, which needs {rules.min_pixels:,} pixels; "
            "use 256x256 or more, or watermark none"
        ),
    )
    eta = bounds("eta")[1]
    for sampler, drawn in _samplers(columns, count, rules):
        if sampler not in SAMPLERS_WITH_ETA:
            yield (
                frozenset({"sampler", "eta"}),
                drawn & (eta != 0),
                lambda i, s=sampler: (
                    f"eta {eta[i]:g} does not go with sampler {s}, which sets its noise itself; "
                    f"use eta 0 or sampler {' or '.join(SAMPLERS_WITH_ETA)}"
                ),
            )
        for steps in _distinct_steps(columns, rules):
            fault = rules.steps_fault(sampler, steps)
            if fault is not None:
                taken = bounds("num_inference_steps")[0] == steps
                bad = drawn if "num_inference_steps" in rules.axes else drawn & taken
                yield frozenset({"sampler", "num_inference_steps"}), bad, lambda _, f=fault: f
    if "image" in columns:
        fewest, strength = bounds("num_inference_steps")[0], bounds("strength")[0]
        yield (
            frozenset({"image", "strength", "num_inference_steps"}),
            columns["image"].is_valid().to_numpy(zero_copy_only=False) & (fewest * strength < 1),
            lambda i: f"strength {strength[i]:g} of {fewest[i]} steps is less than one step; raise one of them",
        )
    images = bounds("num_images")[1]
    if "seed" in rules.axes or "seed" in columns:
        seeds = (
            bounds("seed")[1] if "seed" in rules.axes else columns["seed"].fill_null(0).to_numpy(zero_copy_only=False)
        )
        yield (
            frozenset({"seed", "num_images"}),
            seeds + images > SEED_LIMIT,
            lambda i: f"seed {seeds[i]} with num_images {images[i]} runs past {SEED_LIMIT - 1}; lower one of them",
        )


def _samplers(columns: Mapping[str, pa.Array], count: int, rules: Rules) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each sampler with the rows that use it in at least one combination of the axes."""
    if "sampler" in rules.axes or "sampler" not in columns:
        for sampler in rules.axes.get("sampler", (rules.defaults["sampler"],)):
            yield str(sampler), np.full(count, fill_value=True)
        return
    filled = columns["sampler"].fill_null(rules.defaults["sampler"])
    for sampler in filled.unique().to_pylist():
        yield sampler, np.asarray(pc.equal(filled, sampler).to_numpy(zero_copy_only=False), dtype=bool)


def _distinct_steps(columns: Mapping[str, pa.Array], rules: Rules) -> list[int]:
    name = "num_inference_steps"
    if name in rules.axes or name not in columns:
        return [int(steps) for steps in rules.axes.get(name, (rules.defaults[name],))]
    return [int(steps) for steps in columns[name].fill_null(rules.defaults[name]).unique().to_pylist()]


def length_fault(name: str, value: Value, rules: Rules) -> str | None:
    """Why an axis value or default of a text is too long, or None."""
    if rules.tokens is None or name not in FIELDS_WITH_TEXT:
        return None
    return rules.tokens.fault(name, rules.tokens.count(name, str(value)))


def value_fault(name: str, value: Value, rules: Rules) -> str | None:
    """Why model or job refuse one value, or None."""
    if name in FIELDS_WITH_TEXT:
        return rules.texts.fault(name, str(value))
    if name not in {"width", "height"} or not isinstance(value, int) or rules.fits(value):
        return None
    if value % rules.factor:
        below, above = value // rules.factor * rules.factor, (value // rules.factor + 1) * rules.factor
        near = f"{below} or {above}" if below else f"{above}"
        return f"{name} {value} is not a multiple of {rules.factor}, the model's factor; use {near}"
    return f"{name} {value} is more than {rules.max_side}, the model's longest side"
