"""The parameters of a sample, their types and limits: one table for manifest columns, axes, flags and job files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from latentmill.engine import SAMPLER_CHOICES, SEED_LIMIT

MAX_TEXT_BYTES = 16_384
"""Longest prompt, negative prompt or id, in bytes of UTF-8: more than any text encoder reads."""

MAX_SIDE = 4096
MAX_IMAGES = 1000
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0

DEFAULT_STRENGTH = 0.8
"""That of diffusers. Not of a job without images, whose plans were made before there were any."""

Kind = Literal["text", "int", "float", "sampler"]
Value = int | float | str


class FieldError(ValueError):
    """A value that a field refuses; the message names the value, the limit and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One parameter. `low` and `high` are inclusive and belong to numbers only."""

    name: str
    kind: Kind
    low: float = 0
    high: float = 0

    def parse(self, value: Any) -> Value:
        """The value with this field's type, if it is allowed. Numbers may be text, as CSV and flags give them."""
        if self.kind in {"int", "float"}:
            return self._number(value)
        if not isinstance(value, str):
            raise FieldError(f"{self.name} is {shorten(value)}, expected text; quote it")
        if self.kind == "sampler" and value not in SAMPLER_CHOICES:
            near, known = nearest(value, SAMPLER_CHOICES), ", ".join(SAMPLER_CHOICES)
            raise FieldError(f"sampler {shorten(value)} is unknown{near}; known: {known}")
        fault = text_fault(value)
        if fault:
            raise FieldError(f"{self.name} {fault}")
        return value

    @property
    def allowed(self) -> str:
        """A description of the allowed values."""
        if self.kind == "sampler":
            return ", ".join(SAMPLER_CHOICES)
        if self.kind == "text":
            return f"up to {MAX_TEXT_BYTES:,} bytes of UTF-8"
        return f"{self.low:.10g} to {self.high:.10g}"

    def range_fault(self, value: float) -> str:
        """The reason for refusing a number outside the limits."""
        return f"{self.name} {shorten(value)} is outside {self.low:.10g}..{self.high:.10g}; choose a value inside"

    def _number(self, value: Any) -> int | float:
        expected = "a whole number" if self.kind == "int" else "a number"
        parsed: int | float | None = None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parsed = value
        elif isinstance(value, str):
            parsed = _parse_text(value)
        broken = isinstance(parsed, float) and math.isfinite(parsed) and parsed != int(parsed)
        if parsed is None or (self.kind == "int" and broken):
            raise FieldError(f"{self.name} {shorten(value)} is not {expected}; write {expected}")
        if not self.low <= parsed <= self.high:  # also refuses NaN
            raise FieldError(self.range_fault(parsed))
        return int(parsed) if self.kind == "int" else float(parsed)


def _parse_text(text: str) -> int | float | None:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return None


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field(name="prompt", kind="text"),
        Field(name="negative_prompt", kind="text"),
        Field(name="seed", kind="int", high=SEED_LIMIT - 1),
        Field(name="width", kind="int", low=1, high=MAX_SIDE),
        Field(name="height", kind="int", low=1, high=MAX_SIDE),
        Field(name="guidance_scale", kind="float", high=MAX_GUIDANCE),
        Field(name="num_inference_steps", kind="int", low=1, high=MAX_STEPS),
        Field(name="sampler", kind="sampler"),
        Field(name="eta", kind="float", high=1),
        Field(name="image", kind="text"),
        Field(name="strength", kind="float", high=1),
        Field(name="mask", kind="text"),
        Field(name="num_images", kind="int", low=1, high=MAX_IMAGES),
        Field(name="loras", kind="text"),
        Field(name="id", kind="text"),
        Field(name="model", kind="text"),
    )
}
"""The manifest's own columns; every other column is carried through."""

MODEL = "model"
"""The axis and column of models. Its values are places of models, which the planner finds."""

AXES = (
    MODEL,
    "prompt",
    "negative_prompt",
    "seed",
    "guidance_scale",
    "num_inference_steps",
    "sampler",
    "eta",
    "strength",
    "width",
    "height",
)
"""Parameters that a sweep may vary."""


def text_fault(value: str) -> str | None:
    """Why a text cannot be a prompt or an id, or None."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "holds a lone surrogate or bytes that are not UTF-8; save the file as UTF-8"
    if size > MAX_TEXT_BYTES:
        return f"has {size:,} bytes, the limit is {MAX_TEXT_BYTES:,}; shorten it"
    if "\0" in value:
        return "holds a NUL character; remove it"
    return None


def shorten(value: object, limit: int = 60) -> str:
    """The value's repr, fit for one line of an error message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**limit:
        return f"of more than {limit} digits"  # the repr of a huge int is itself refused by Python
    shown = repr(value) if isinstance(value, str) else str(value)
    shown = shown.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` if a known name is close to `name`, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""
