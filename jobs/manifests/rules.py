"""What model and job require of a row beyond each field's limits: sizes, samplers, steps, seeds, prompt lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.engine import SAMPLERS_WITH_ETA, SEED_LIMIT
from latentmill.jobs.manifests.fields import Value
from latentmill.jobs.manifests.image_rows import ImageRows
from latentmill.jobs.manifests.tokens import TokenCounter


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What rows are checked against. If an axis gives a parameter, the row's value and the default do not count.

    `steps_fault` says why a sampler cannot take so many steps, or None. `tokens` is given if long prompts are faults,
    `images` if rows may name an image.
    """

    factor: int
    min_pixels: int
    steps_fault: Callable[[str, int], str | None]
    defaults: Mapping[str, Value]
    axes: Mapping[str, tuple[Value, ...]]
    tokens: TokenCounter | None = None
    images: ImageRows | None = None


Rule = tuple[frozenset[str], NDArray[np.bool_], Any]


def pair_rules(columns: Mapping[str, pa.Array], count: int, rules: Rules) -> Iterator[Rule]:
    """Rules over several fields: each rule's parameters, the rows that break it, and the reason for one row."""

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
            bad = values % rules.factor != 0
            yield frozenset({name}), bad, lambda i, n=name, v=values: value_fault(n, int(v[i]), rules)
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
    """Why an axis value or default of the negative prompt is too long, or None."""
    if rules.tokens is None or name != "negative_prompt":
        return None
    return rules.tokens.fault(name, rules.tokens.count(str(value)))


def value_fault(name: str, value: Value, rules: Rules) -> str | None:
    """Why the model refuses one value, or None."""
    if name in {"width", "height"} and isinstance(value, int) and value % rules.factor:
        below, above = value // rules.factor * rules.factor, (value // rules.factor + 1) * rules.factor
        near = f"{below} or {above}" if below else f"{above}"
        return f"{name} {value} is not a multiple of {rules.factor}, the model's factor; use {near}"
    return None
