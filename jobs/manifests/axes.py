"""Sweep axes: parameters with lists of values, whose product is made of every row, by arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import AXES, FIELDS, FieldError, Value, nearest, shorten
from latentmill.jobs.manifests.loras import lora_of_axis, scale_field

MAX_AXIS_VALUES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One parameter and its distinct values, in the order given."""

    name: str
    values: tuple[Value, ...]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Split a flag such as `seed=0:16` or `sampler=ddim,plms` into the axis's name and its raw values."""
    name, separator, values = text.partition("=")
    if not separator or not name.strip() or not values.strip():
        raise UsageError(
            f"--sweep {shorten(text)} is not AXIS=VALUES; write for example guidance_scale=3,5,7.5 or seed=0:16"
        )
    name = name.strip() if lora_of_axis(name.strip()) else name.strip().replace("-", "_")
    if name == "negative_prompt":
        raise UsageError("--sweep negative_prompt would be split at its commas; give this axis as a list in a job file")
    return name, [part.strip() for part in values.split(",")]


def build_axes(sweep: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Check names and values, expand ranges; the first axis varies slowest, the last fastest."""
    return tuple(_build_axis(name, values) for name, values in sweep.items())


def count_combinations(axes: Sequence[Axis]) -> int:
    """Samples per row and image: the product of the axes' lengths."""
    return math.prod(len(axis.values) for axis in axes)


def _build_axis(name: str, values: Any) -> Axis:
    if name not in AXES and lora_of_axis(name) is None:
        raise UsageError(
            f"sweep axis {name!r} is unknown{nearest(name, AXES)}; the axes are {', '.join(AXES)}, lora.NAME"
        )
    field = FIELDS[name] if name in AXES else scale_field(name)
    raw = list(values) if isinstance(values, (list, tuple)) else [values]
    expanded: list[Any] = []
    for value in raw:
        is_range = field.kind == "int" and isinstance(value, str) and ":" in value
        expanded.extend(_expand_range(name, value) if is_range else [value])
        if len(expanded) > MAX_AXIS_VALUES:
            raise UsageError(
                f"sweep axis {name} has more than {MAX_AXIS_VALUES:,} values; put them into the manifest instead"
            )
    if not expanded:
        raise UsageError(f"sweep axis {name} has no values; give at least one, or leave the axis out")
    try:
        parsed = tuple(field.parse(value) for value in expanded)
    except FieldError as error:
        raise UsageError(f"sweep axis {name}: {error}") from None
    if len(set(parsed)) != len(parsed):
        twice = Counter(parsed).most_common(1)[0][0]
        raise UsageError(f"sweep axis {name} has {shorten(twice)} twice; give each value once")
    return Axis(name=name, values=parsed)


def _expand_range(name: str, text: str) -> range:
    """`a:b` and `a:b:step`, half-open as in Python."""
    try:
        numbers = [int(part) for part in text.split(":")]
        if len(numbers) not in {2, 3}:
            raise ValueError(text)
        expanded = range(*numbers)
    except ValueError:
        raise UsageError(
            f"sweep axis {name}: {shorten(text)} is not a range; write a:b or a:b:step, for example 0:16"
        ) from None
    if not expanded:
        raise UsageError(f"sweep axis {name}: the range {text} is empty; a:b runs from a up to, but not including, b")
    if len(expanded) > MAX_AXIS_VALUES:
        raise UsageError(
            f"sweep axis {name}: the range {text} has {len(expanded):,} values, the limit is {MAX_AXIS_VALUES:,}"
        )
    return expanded
