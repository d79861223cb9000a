"""Rows as JSON has them: what it has no word for is written as text."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pyarrow as pa


def json_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Each row as an object that `to_json` writes."""
    columns = [[_plain(value) for value in _values(column)] for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def to_json(value: Any) -> str:
    """One line, always the same one."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def is_plain(type_: Any) -> bool:
    """Whether its values are texts, numbers, truths or nulls, of which CSV has a form of its own."""
    kinds = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_null)
    return any(is_kind(type_) for is_kind in kinds) or bool(pa.types.is_large_string(type_))


def _values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
        column = column.cast(pa.string())  # Python's own times stop at microseconds
    values: list[Any] = column.to_pylist()
    return values


def _plain(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)
