"""What a setting of a job is: declared once, as a field of `JobSpec` or `Runtime` in spec.py.

Its flag, its key in job files, its check, whether it is part of the plan, and its line in docs/settings.md come
from that declaration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentmill.jobs.manifests.fields import FIELDS, Field, FieldError, nearest, shorten, text_fault

INPUT = "Input and output"
PICTURES = "Pictures"
SAFETY = "Safety and watermark"
CUTTING = "Chunks and batches"
RUNNING = "Where it runs (never changes a picture)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting. `parse` gives the value its type, from a flag's text or a job file's value, or raises FieldError.

    `planned`: it can change a pixel or a row, so two plans that differ in it are two plans. `allowed` says in words
    which values it takes, where that is more than its kind says.
    """

    panel: str
    help: str
    kind: type
    parse: Callable[[str, Any], Any]
    planned: bool = False
    allowed: str = ""
    several: bool = False
    metavar: str | None = None


def settings_of(spec: type) -> Mapping[str, Setting]:
    """The settings that a dataclass declares, by name, in order."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(spec) if "setting" in field.metadata}


def default_of(spec: type, name: str) -> Any:
    """The default of a setting that has one."""
    return next(field.default for field in dataclasses.fields(spec) if field.name == name)


def parameter(name: str, text: str, default: Any = None) -> Any:
    """A parameter of a sample, which rows and axes may give as well: its type and limits are those of the column."""
    field = FIELDS[name]
    kind, allowed = _KINDS[field.kind], field.allowed
    return _declare(
        default, Setting(panel=PICTURES, help=text, kind=kind, parse=_parameter, planned=True, allowed=allowed)
    )


def whole(default: int | None, panel: str, text: str, low: int, high: int, *, planned: bool = False) -> Any:
    """A whole number from `low` to `high`."""
    return _number(default, panel, text, low, high, planned=planned, kind=int)


def number(default: float | None, panel: str, text: str, low: float, high: float, *, planned: bool = False) -> Any:
    """A number from `low` to `high`."""
    return _number(default, panel, text, low, high, planned=planned, kind=float)


def choice(default: str | None, panel: str, text: str, choices: Sequence[str], *, planned: bool = False) -> Any:
    """One of a few words."""

    def parse(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            near = nearest(value, choices) if isinstance(value, str) else ""
            raise FieldError(f"{name} {shorten(value)} does not exist{near}; there is {', '.join(choices)}")
        return value

    allowed = ", ".join(choices)
    return _declare(default, Setting(panel=panel, help=text, kind=str, parse=parse, planned=planned, allowed=allowed))


def text(default: str | None, panel: str, help_text: str, *, pattern: str = "", planned: bool = False) -> Any:
    """Any text without control characters that a prompt could not hold either; with `pattern`, only what it matches."""

    def parse(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise FieldError(f"{name} is {shorten(value)}, expected text; quote it")
        fault = text_fault(value)
        if fault:
            raise FieldError(f"{name} {fault}")
        if pattern and not re.fullmatch(pattern, value):
            raise FieldError(f"{name} is {shorten(value)}; it must match {pattern}")
        return value

    return _declare(default, Setting(panel=panel, help=help_text, kind=str, parse=parse, planned=planned))


def switch(panel: str, text: str) -> Any:
    """Off, unless it is named."""

    def parse(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise FieldError(f"{name} is {shorten(value)}, expected true or false")
        return value

    return _declare(False, Setting(panel=panel, help=text, kind=bool, parse=parse))  # noqa: FBT003 - the default


def special(
    panel: str,
    text: str,
    parse: Callable[[str, Any], Any],
    *,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    planned: bool = False,
    several: bool = False,
    metavar: str | None = None,
) -> Any:
    """A setting with a check of its own."""
    setting = Setting(panel=panel, help=text, kind=str, parse=parse, planned=planned, several=several, metavar=metavar)
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata={"setting": setting})
    return _declare(default, setting)


_KINDS: Mapping[str, type] = {"int": int, "float": float, "text": str, "sampler": str}


def _declare(default: Any, setting: Setting) -> Any:
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        setting = dataclasses.replace(setting, help=f"{setting.help} Default: {default}.")
    return dataclasses.field(default=default, metadata={"setting": setting})


def _parameter(name: str, value: Any) -> Any:
    return FIELDS[name].parse(value)


def _number(default: float | None, panel: str, text: str, low: float, high: float, *, planned: bool, kind: type) -> Any:
    def limits(name: str) -> Field:
        return Field(name=name, kind="int" if kind is int else "float", low=low, high=high)

    def parse(name: str, value: Any) -> int | float | str:
        return limits(name).parse(value)

    allowed = limits("").allowed
    return _declare(default, Setting(panel=panel, help=text, kind=kind, parse=parse, planned=planned, allowed=allowed))
