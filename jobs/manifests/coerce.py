"""Columns of rows with the types of the snapshot; a refused value becomes null, and its row gets a reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.engine import SAMPLER_CHOICES
from latentmill.jobs.manifests.columns import to_plain
from latentmill.jobs.manifests.fields import MAX_TEXT_BYTES, Field, FieldError, shorten

ARROW_TYPES = {"text": pa.string(), "sampler": pa.string(), "int": pa.int64(), "float": pa.float64()}

_ID_LIMIT = 10**60


def coerce(field: Field, values: Any, faults: dict[int, list[str]]) -> pa.Array:
    """The column with its field's type; values that the field refuses become null and a fault."""
    array = _fast_array(field, values)
    if array is None:
        return _slow_array(field, values if isinstance(values, list) else _without_nan(to_pylist(values)), faults)
    suspects = np.flatnonzero(_suspects(field, array))
    if not len(suspects):
        return array
    mask = np.zeros(len(array), dtype=bool)
    for index in suspects:
        try:
            field.parse(array[int(index)].as_py())
        except FieldError as error:
            faults.setdefault(int(index), []).append(str(error))
            mask[index] = True
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def _fast_array(field: Field, values: Any) -> pa.Array | None:
    """The column cast in one step, or None if a value cannot be cast."""
    type_ = ARROW_TYPES[field.kind]
    try:
        if not isinstance(values, list):
            array = to_plain(values)
            if pa.types.is_floating(array.type) and field.kind in {"int", "float"}:
                # pandas writes missing numbers as NaN
                array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
            array.validate(full=True)
            return array.cast(type_)
        kinds = set(map(type, values)) - {type(None)}
        if field.kind in {"int", "float"} and kinds == {str}:
            return pc.utf8_trim_whitespace(pa.array(values, pa.string())).cast(type_)
        if not kinds <= ({str} if type_ == pa.string() else {int} if field.kind == "int" else {int, float}):
            return None
        return pa.array(values, type_)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _slow_array(field: Field, values: list[Any], faults: dict[int, list[str]]) -> pa.Array:
    parsed: list[Any] = [None] * len(values)
    for index, value in enumerate(values):
        if value is None:
            continue
        if field.name == "id" and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) >= _ID_LIMIT:
                faults.setdefault(index, []).append(f"id {shorten(value)} is too long for a number; write it in quotes")
                continue
            value = str(value)  # noqa: PLW2901 - brought to one form
        if field.kind in {"int", "float"} and isinstance(value, str):
            value = value.strip()  # noqa: PLW2901 - brought to one form
        try:
            parsed[index] = field.parse(value)
        except FieldError as error:
            faults.setdefault(index, []).append(str(error))
    return pa.array(parsed, ARROW_TYPES[field.kind])


def _without_nan(values: list[Any]) -> list[Any]:
    """NaN as None: pandas writes it for a missing number. In JSON it writes null, so NaN is a value there."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]


def to_pylist(array: pa.Array) -> list[Any]:
    """The values as Python objects; text that is not UTF-8 gets lone surrogates instead of an exception."""
    plain = to_plain(array)
    if pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type):
        binary = plain.view(pa.binary() if pa.types.is_string(plain.type) else pa.large_binary())
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in binary.to_pylist()]
    return list(plain.to_pylist())


def _suspects(field: Field, array: pa.Array) -> NDArray[np.bool_]:
    """Rows whose value needs a closer look; every refused value is among them."""
    if field.kind == "text":
        found = pc.or_(pc.greater(pc.binary_length(array), MAX_TEXT_BYTES), pc.match_substring(array, "\0"))
    elif field.kind == "sampler":
        found = pc.invert(pc.is_in(array, value_set=pa.array([*SAMPLER_CHOICES, None], pa.string())))
    else:
        inside = pc.and_(pc.greater_equal(array, field.low), pc.less_equal(array, field.high))
        found = pc.invert(inside)
    return np.asarray(found.fill_null(fill_value=False).to_numpy(zero_copy_only=False), dtype=bool)


def carry(name: str, type_: Any, values: Any, count: int, faults: dict[int, list[str]]) -> pa.Array:
    """A carried column unchanged; a value that does not have the column's type is a fault."""
    if values is None:
        return pa.nulls(count, type_)
    try:
        array = pa.array(values, type_) if isinstance(values, list) else to_plain(values).cast(type_)
        array.validate(full=True)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return _carry_one_by_one(name, type_, values, faults)
    return array


def _carry_one_by_one(name: str, type_: Any, values: Any, faults: dict[int, list[str]]) -> pa.Array:
    pieces = []
    for index in range(len(values)):
        piece = values[index : index + 1]
        try:
            array = pa.array(piece, type_) if isinstance(piece, list) else to_plain(piece).cast(type_)
            array.validate(full=True)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            faults.setdefault(index, []).append(f"column {shorten(name)} holds a value that is not {type_}; correct it")
            array = pa.nulls(1, type_)
        pieces.append(array)
    return pa.concat_arrays(pieces)
