"""Sweep axes: parameters with lists of values, whose product is made of every row, by arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.axis_values import MAX_AXIS_VALUES, expand_values, listed_models, read_values
from latentmill.jobs.manifests.fields import AXES, FIELDS, MODEL, Field, FieldError, Value, nearest, shorten
from latentmill.jobs.manifests.loras import lora_of_axis, scale_field
from latentmill.jobs.manifests.replacements import (
    FIELDS_WITH_TEXT,
    parse_replacement,
    replaced_by,
    replacement_name,
    replacement_values,
)

__all__ = ["MAX_AXIS_VALUES", "Axis", "Dimension", "build_axes", "build_dimensions", "count_combinations", "parse_axis"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One parameter and its values, in the order given."""

    name: str
    values: tuple[Value, ...]


Dimension = tuple[Axis, ...]
"""One axis, or several that vary together: the first value of each, then the second of each, and so on."""


def parse_axis(text: str) -> tuple[str, Any]:
    """Split a flag such as `seed=0:16` or `prompt=@FILE` into the axis's name and its raw values or `@FILE`."""
    replacement = parse_replacement(text)
    if replacement is None:
        name, separator, values = text.partition("=")
        name = name.strip() if lora_of_axis(name.strip()) else name.strip().replace("-", "_")
    else:
        name, rest = replacement
        if not rest.startswith("="):
            return name, replacement_values(text, rest)
        separator, values = "=", rest[1:]
    if not separator or not name or not values.strip():
        raise UsageError(
            f"--sweep {shorten(text)} is not AXIS=VALUES; write for example guidance_scale=3,5,7.5 or seed=0:16"
        )
    if values.strip().startswith("@"):
        return name, values.strip()
    if name in FIELDS_WITH_TEXT:
        raise UsageError(
            f"--sweep {name} would be split at its commas; give a file with one text on each line, {name}=@FILE, or a "
            f"list in a job file"
        )
    return name, [part.strip() for part in values.split(",")]


def listed_values(name: str, values: Any) -> list[Any]:
    """The raw values of an axis of a job file or flag: a list, `@FILE`, one value, or several as a flag has them."""
    if name == MODEL:
        return listed_models(values)
    if isinstance(values, list | tuple):
        return list(values)
    if isinstance(values, str) and values.startswith("@"):
        return list(read_values(name, values.removeprefix("@")))
    if isinstance(values, str) and name not in FIELDS_WITH_TEXT:
        flag = f"{name}{values}/" if replaced_by(name) and values.startswith("{") else f"{name}={values}"
        return list(parse_axis(flag)[1])
    return [values]


def build_axes(sweep: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Check names and values, expand ranges; the first axis varies slowest, the last fastest."""
    return tuple(_build_axis(name, values) for name, values in sweep.items())


def build_dimensions(axes: Sequence[Axis], zips: Sequence[Sequence[str]]) -> tuple[Dimension, ...]:
    """The axes in their order, those of each group of `zips` together at the place of the first; none is doubled."""
    by_name = {axis.name: axis for axis in axes}
    if len(by_name) < len(axes):
        raise UsageError(f"the sweep has an axis twice; its axes: {', '.join(axis.name for axis in axes)}")
    zipped: dict[str, Dimension] = {}
    for names in zips:
        group = tuple(sorted((_find(name, by_name) for name in names), key=axes.index))
        _check_group(group, zipped)
        zipped |= {axis.name: group for axis in group}
    dimensions = tuple(dict.fromkeys(zipped.get(axis.name, (axis,)) for axis in axes))
    for dimension in dimensions:
        _check_distinct(dimension)
    return dimensions


def models_of(axes: Sequence[Axis]) -> tuple[str, ...]:
    """The models that an axis names, each once; none without such an axis."""
    named = (str(value) for axis in axes if axis.name == MODEL for value in axis.values)
    return tuple(dict.fromkeys(named))


TOGETHER = " with "
"""Between the names of axes that vary together."""


def joined_axis(dimension: Dimension, named: Callable[[str, Value], str]) -> Axis:
    """A dimension as one axis to be shown: of axes that vary together, names and `named` values are joined."""
    if len(dimension) == 1:
        return dimension[0]
    places = zip(*(axis.values for axis in dimension), strict=True)
    names = [axis.name for axis in dimension]
    return Axis(
        name=TOGETHER.join(names),
        values=tuple(", ".join(map(named, names, place)) for place in places),
    )


def count_combinations(dimensions: Sequence[Dimension]) -> int:
    """Samples per row and image: the product of the dimensions' lengths."""
    return math.prod(len(dimension[0].values) for dimension in dimensions)


def _build_axis(name: str, values: Any) -> Axis:
    name, field = _named(name)
    expanded = expand_values(name, field.kind, values if isinstance(values, list | tuple) else [values])
    if not expanded:
        raise UsageError(f"sweep axis {name} has no values; give at least one, or leave the axis out")
    try:
        return Axis(name=name, values=tuple(field.parse(value) for value in expanded))
    except FieldError as error:
        raise UsageError(f"sweep axis {name}: {error}") from None


def _named(name: str) -> tuple[str, Field]:
    """The axis's name in its one spelling, and what its values must be."""
    replaced = replaced_by(name)
    if replaced is not None:
        return replacement_name(*replaced), Field(name="value", kind="text")
    if lora_of_axis(name) is not None:
        return name, scale_field(name)
    if name not in AXES:
        raise UsageError(
            f"sweep axis {name!r} is unknown{nearest(name, AXES)}; the axes are {', '.join(AXES)}, lora.NAME, and "
            f"prompt.s/TEXT/{{VALUES}}/"
        )
    return name, FIELDS[name]


def _find(name: str, by_name: Mapping[str, Axis]) -> Axis:
    found = by_name.get(name) or by_name.get(name.replace("-", "_"))
    if found is None:
        raise UsageError(f"zip names {shorten(name)}, which is no axis of the sweep; its axes: {', '.join(by_name)}")
    return found


def _check_group(group: Dimension, zipped: Mapping[str, Dimension]) -> None:
    if len(group) < 2:
        raise UsageError("zip pairs two or more axes; write for example zip width,height")
    again = next((axis.name for axis in group if axis.name in zipped or group.count(axis) > 1), None)
    if again is not None:
        raise UsageError(f"zip names the axis {again} twice; an axis can be in one group")
    lengths = {axis.name: len(axis.values) for axis in group}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length:,} values" for name, length in lengths.items())
        raise UsageError(f"zip pairs axes value by value, but {counts}; give each as many")


def _check_distinct(dimension: Dimension) -> None:
    places = list(zip(*(axis.values for axis in dimension), strict=True))
    if len(set(places)) != len(places):
        twice = Counter(places).most_common(1)[0][0]
        name, shown = TOGETHER.join(axis.name for axis in dimension), ", ".join(map(shorten, twice))
        raise UsageError(f"sweep axis {name} has {shown} twice; give each value once")
