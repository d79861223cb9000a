"""One field of a model's JSON at a time: of the kind that is asked for and within its limits, or an error of one line.

A field that is absent or null has its default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latentmill.engine.loading.files import shown
from latentmill.engine.types import EngineError

Json = Mapping[str, Any]


class Fields:
    """A JSON object, and the file that errors name."""

    def __init__(self, config: Json, where: str) -> None:
        self._config = config
        self._where = where

    def whole(self, name: str, default: int | None, most: int, *, least: int = 1) -> int:
        """A whole number from `least` to `most`. Without a default the field must be there."""
        value = self._config.get(name)
        value = default if value is None else value
        if not _is_whole(value) or not least <= value <= most:
            raise self.refusal(name, f"a whole number from {least} to {most}")
        return int(value)

    def wholes(self, name: str, default: tuple[int, ...], most: int, *, length: int) -> tuple[int, ...]:
        """1 to `length` whole numbers from 1 to `most`."""
        value = self._config.get(name)
        value = default if value is None else value
        if (
            not isinstance(value, list | tuple)
            or not 1 <= len(value) <= length
            or not all(_is_whole(entry) and 1 <= entry <= most for entry in value)
        ):
            raise self.refusal(name, f"1 to {length} whole numbers from 1 to {most}")
        return tuple(value)

    def per_level(self, name: str, default: int, most: int, *, levels: int) -> tuple[int, ...]:
        """One whole number from 1 to `most` per level: a list of them, or one for all."""
        value = self._config.get(name)
        value = default if value is None else value
        values = [value] * levels if _is_whole(value) else value
        if (
            not isinstance(values, list | tuple)
            or len(values) != levels
            or not all(_is_whole(entry) and 1 <= entry <= most for entry in values)
        ):
            raise self.refusal(name, f"one whole number per level ({levels} levels), from 1 to {most}")
        return tuple(values)

    def number(self, name: str, default: float, most: float, *, least: float = 0.0) -> float:
        """A number from `least` to `most`."""
        value = self._config.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.refusal(name, f"a number from {least:g} to {most:g}")
        return value

    def numbers(self, name: str, most: float, *, length: int) -> tuple[float, ...] | None:
        """1 to `length` numbers from 0 to `most`; None where there are none."""
        value = self._config.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, list | tuple)
            or not 1 <= len(value) <= length
            or not all(isinstance(entry, int | float) and math.isfinite(entry) and 0 <= entry <= most for entry in value)
        ):
            raise self.refusal(name, f"1 to {length} numbers from 0 to {most:g}")
        return tuple(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false; null counts as false, as it does in the library that writes these files."""
        value = self._config.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return bool(value)

    def refusal(self, name: str, expected: str) -> EngineError:
        """The error for a field that is not as `expected`."""
        return EngineError(
            f"{self._where} has {name}={shown(self._config.get(name))}: expected {expected}; put back the model's own "
            "file"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
