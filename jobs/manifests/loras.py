"""LoRAs in a job: their names, their places and their scales, as flags, columns and axes have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from latentmill.engine import LORA_NAME, LORA_SCALE_LIMIT, LORAS_LIMIT
from latentmill.jobs.manifests.fields import Field, FieldError, shorten

COLUMN = "loras"
"""The manifest's column, and the dataset's: `ink:0.8,clay:-0.5`."""

AXIS_PREFIX = "lora."
_SCALED = re.compile(r"(.+?)\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))", re.DOTALL)


def scale_field(name: str) -> Field:
    """What the scale of a LoRA may be."""
    return Field(name=name, kind="float", low=-LORA_SCALE_LIMIT, high=LORA_SCALE_LIMIT)


def parse_loras(name: str, value: Any) -> dict[str, str]:
    """The setting: `NAME=PLACE[:SCALE]`, several of them, or a mapping; afterwards each name has its `PLACE:SCALE`."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        pairs = [(lora, place) for lora, _, place in (text.partition("=") for text in texts)]
    else:
        raise FieldError(f"{name} is {shorten(value)}, expected NAME=PLACE, NAME=PLACE:SCALE, or a list of them")
    loras: dict[str, str] = {}
    for lora, text in pairs:
        if not isinstance(lora, str) or not re.fullmatch(LORA_NAME, lora):
            raise FieldError(f"{name} {shorten(lora)} is no name that matches {LORA_NAME}; write NAME=PLACE:SCALE")
        if not isinstance(text, str) or not text or lora in loras:
            raise FieldError(f"{name} {lora} must be given once, with a place; write {lora}=PLACE or {lora}=PLACE:0.8")
        place, scale = split_place(text)
        loras[lora] = f"{place}:{format_scale(float(scale_field(f'{name} {lora}').parse(scale)))}"
    if len(loras) > LORAS_LIMIT:
        raise FieldError(f"{name} names {len(loras)} LoRAs, the limit is {LORAS_LIMIT}; name fewer")
    return loras


def split_place(text: str) -> tuple[str, float]:
    """`PLACE:SCALE` as both; the scale is 1 where none is given."""
    scaled = _SCALED.fullmatch(text)
    return (scaled[1], float(scaled[2])) if scaled else (text, 1.0)


def format_scale(scale: float) -> str:
    """The shortest text that reads as this number."""
    return repr(float(scale)).removesuffix(".0")


def format_scales(scales: Mapping[str, float]) -> str:
    """Scales as the dataset's column has them: of those LoRAs that count, by name."""
    return ",".join(f"{name}:{format_scale(scale)}" for name, scale in sorted(scales.items()) if scale)


def parse_scales(text: str) -> dict[str, float]:
    """The reverse, as a manifest's column may have it: a name without a number has the scale 1. Raises FieldError."""
    scales: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        scaled = _SCALED.fullmatch(part)
        name, scale = (scaled[1].strip(), float(scaled[2])) if scaled else (part, 1.0)
        if not re.fullmatch(LORA_NAME, name) or name in scales:
            raise FieldError(f"loras {shorten(text)} is not NAME:SCALE,NAME:SCALE with each name once; correct it")
        scales[name] = float(scale_field(f"the scale of LoRA {name}").parse(scale))
    return scales


def lora_of_axis(name: str) -> str | None:
    """The LoRA whose scale an axis gives; None for every other axis."""
    return name.removeprefix(AXIS_PREFIX) if name.startswith(AXIS_PREFIX) else None
