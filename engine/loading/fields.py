"""One field of a model's JSON at a time: of the right type and within its limits, or an error in one line.

A field that is absent or null has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentmill.engine.loading.files import shown
from latentmill.engine.types import EngineError


class Fields:
    """A JSON object, and the file that errors name."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def whole(self, name: str, default: int | None, most: int, *, least: int = 1) -> int:
        """A whole number from `least` to `most`. Without a default the field must be there."""
        value: Any = self._config.get(name)
        value = default if value is None else value
        if not _is_whole(value) or not least <= value <= most:
            raise self.refusal(name, f"a whole number from {least} to {most}")
        return int(value)

    def wholes(self, name: str, default: tuple[int, ...], most: int, *, length: int) -> tuple[int, ...]:
        """1 to `length` whole numbers from 1 to `most`."""
        value = self._config.get(name)
        values = default if value is None else value
        if not _are_wholes(values, most) or not 1 <= len(values) <= length:
            raise self.refusal(name, f"1 to {length} whole numbers from 1 to {most}")
        return tuple(values)

    def per_level(self, name: str, default: int, most: int, *, levels: int) -> tuple[int, ...]:
        """One whole number from 1 to `most` per level: a list of them, or one for all."""
        value = self._config.get(name)
        value = default if value is None else value
        values: Any = [value] * levels if _is_whole(value) else value
        if not _are_wholes(values, most) or len(values) != levels:
            raise self.refusal(name, f"one whole number per level ({levels} levels), from 1 to {most}")
        return tuple(values)

    def number(self, name: str, default: float, most: float, *, least: float = 0.0) -> float:
        """A number from `least` to `most`."""
        value = self._config.get(name)
        value = default if value is None else value
        if not _is_number(value) or not least <= value <= most:
            raise self.refusal(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def numbers(self, name: str, most: float, *, length: int) -> tuple[float, ...] | None:
        """1 to `length` numbers from 0 to `most`; None where there are none."""
        values = self._config.get(name)
        if values is None:
            return None
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= length:
            raise self.refusal(name, f"1 to {length} numbers from 0 to {most:g}")
        if not all(_is_number(value) and 0 <= value <= most for value in values):
            raise self.refusal(name, f"numbers from 0 to {most:g}")
        return tuple(map(float, values))

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


def refuse_other_than(config: Mapping[str, Any], where: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a switch whose effect is not built, instead of ignoring it and drawing wrong pictures."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise EngineError(
                f"{where} has {name}={shown(config[name])}, which this engine does not build; "
                f"it supports {', '.join(map(repr, values))}"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_wholes(values: object, most: int) -> bool:
    return isinstance(values, list | tuple) and all(_is_whole(value) and 1 <= value <= most for value in values)
