"""The values of a sweep axis as they are written: lists, ranges, evenly spaced numbers, the lines of a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import Kind, shorten
from latentmill.jobs.store.inputs import read_small, reading
from latentmill.jobs.store.urls import allowed_filesystem, display_url

MAX_AXIS_VALUES = 65_536
MAX_VALUES_BYTES = 16 << 20
"""The most bytes of a file of values."""

_NUMBER = re.compile(r"[+-]?\d{1,12}(\.\d{1,12})?")
_EVENLY = re.compile(r"(?P<first>[^/]+?)\.\.(?P<last>[^/]+)/(?P<count>\d{1,12})")


def expand_values(name: str, kind: Kind, raw: Sequence[Any]) -> list[Any]:
    """The values with ranges in numbers; the fields themselves check each of them later."""
    expanded: list[Any] = []
    for value in raw:
        expanded.extend(_expand(name, kind, value))
        if len(expanded) > MAX_AXIS_VALUES:
            raise UsageError(
                f"sweep axis {name} has more than {MAX_AXIS_VALUES:,} values; put them into the manifest instead"
            )
    return expanded


def listed_models(values: Any) -> list[str]:
    """The models of an axis: a list, or a text with commas; a pattern such as `runs/*.safetensors` is its files."""
    given = values.split(",") if isinstance(values, str) else values
    if not isinstance(given, list | tuple) or not all(isinstance(value, str) for value in given):
        raise UsageError(f"sweep axis model is {shorten(values)}, expected a list of models")
    return [model for value in given for model in _matching(value.strip())]


def _matching(model: str) -> list[str]:
    preset, equals, place = model.rpartition("=")
    if not re.search(r"[*?\[]", place):
        return [model]
    fs, path = allowed_filesystem(place)
    shown = f"sweep axis model: {display_url(place)}"
    with reading(shown, "matches no file; check the pattern"):
        found = sorted(fs.glob(path))
    if not found:
        raise UsageError(f"{shown} matches no file; check the pattern")
    places = [str(fs.unstrip_protocol(match)) if "://" in place else match for match in found]
    return [f"{preset}{equals}{match}" for match in places]


def read_values(name: str, place: str) -> list[str]:
    """The lines of a file of values; blank ones are left out."""
    shown = f"sweep axis {name}: {display_url(place)}"
    data = read_small(
        place,
        shown,
        MAX_VALUES_BYTES,
        remedy="give one value on each line of a text file",
        too_large="put its lines into the manifest",
    )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{shown} is not UTF-8 text; save it as UTF-8") from None
    values = [line.removesuffix("\r") for line in text.split("\n")]
    return [value for value in values if value.strip()]


def _expand(name: str, kind: Kind, value: Any) -> Sequence[Any] | Iterator[Any]:
    if kind not in {"int", "float"} or not isinstance(value, str):
        return [value]
    evenly = _EVENLY.fullmatch(value.strip())
    if evenly is not None:
        return _evenly_spaced(name, kind, value, evenly)
    return _range(name, kind, value) if ":" in value else [value]


def _range(name: str, kind: Kind, text: str) -> Iterator[int | float]:
    """`a:b` and `a:b:step`, half-open as in Python."""
    numbers = [_number(part, kind) for part in text.split(":")]
    start, stop, step = (*numbers, Fraction(1))[:3] if len(numbers) in {2, 3} else (None, None, None)
    if start is None or stop is None or not step:
        raise UsageError(f"sweep axis {name}: {shorten(text)} is not a range; write a:b or a:b:step, for example 0:16")
    count = math.ceil((stop - start) / step)
    if count < 1:
        raise UsageError(f"sweep axis {name}: the range {text} is empty; a:b runs from a up to, but not including, b")
    _check_count(name, f"the range {text}", count)
    return (_plain(start + index * step, kind) for index in range(count))


def _evenly_spaced(name: str, kind: Kind, text: str, found: re.Match[str]) -> list[int | float]:
    """`a..b/n`: n numbers from a to b, both included."""
    first, last, count = _number(found["first"], "float"), _number(found["last"], "float"), int(found["count"])
    if first is None or last is None or count < 2:
        raise UsageError(
            f"sweep axis {name}: {shorten(text)} is not a..b/n; write for example 3..9/5 for 3, 4.5, 6, 7.5, 9"
        )
    _check_count(name, text, count)
    numbers = [first + (last - first) * index / (count - 1) for index in range(count)]
    broken = next((number for number in numbers if kind == "int" and number.denominator != 1), None)
    if broken is not None:
        raise UsageError(
            f"sweep axis {name}: {text} would have {float(broken):g}, which is not a whole number; choose ends and a "
            f"number of values that give whole numbers"
        )
    return [_plain(number, kind) for number in numbers]


def _check_count(name: str, what: str, count: int) -> None:
    if count > MAX_AXIS_VALUES:
        raise UsageError(f"sweep axis {name}: {what} has {count:,} values, the limit is {MAX_AXIS_VALUES:,}")


def _number(text: str, kind: Kind) -> Fraction | None:
    """The number exactly as it is written, so that 0.1:1:0.1 has 0.3 and not 0.30000000000000004."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or (kind == "int" and found[1]):
        return None
    return Fraction(found[0])


def _plain(number: Fraction, kind: Kind) -> int | float:
    return int(number) if kind == "int" else float(number)
