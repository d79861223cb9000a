"""LoRAs in a job: their places with scales, and where a row says how strongly each counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.engine import LORA_NAME, LORA_SCALE_LIMIT, LORAS_LIMIT, EngineError, has_lora_tags, lora_tags
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import Field, FieldError, Value, nearest, shorten

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


class RowLoras:
    """How strongly each LoRA of a job counts in a row: by the axis, else the column, else the prompt, else the flag.

    `defaults` are the flags' scales by name. Prompts name LoRAs only where their syntax is A1111's and the job has any.
    """

    def __init__(self, defaults: Mapping[str, float], syntax: str) -> None:
        self.defaults = dict(sorted(defaults.items()))
        self.reads_tags = bool(defaults) and syntax == "a1111"
        self._warns = not defaults and syntax == "a1111"
        self._ignored = 0

    def of(self, column: str | None, prompt: str, swept: Mapping[str, Value]) -> dict[str, float]:
        """The scale of each LoRA of the job in one sample, also where it is 0."""
        try:
            tags = lora_tags(prompt) if self.reads_tags else {}
        except EngineError:
            tags = {}  # the engine reads them once more, and gives the row this reason
        scales = self.defaults | tags | parse_scales(column or "")
        axes = {name: swept[f"{AXIS_PREFIX}{name}"] for name in scales if f"{AXIS_PREFIX}{name}" in swept}
        return {name: float(axes.get(name, scale)) for name, scale in scales.items()}

    def faults(self, columns: Mapping[str, pa.Array]) -> Iterator[tuple[int, str]]:
        """Rows that name LoRAs in a way that cannot be read, or one that the job does not have."""
        prompts = columns["prompt"]
        tagged = pc.match_substring(prompts, "<lora:").fill_null(fill_value=False)
        if self._warns:
            self._ignored += int(pc.sum(tagged).as_py() or 0)
        if self.reads_tags:
            for index in np.flatnonzero(tagged.to_numpy(zero_copy_only=False)):
                yield from self._fault(int(index), lora_tags, prompts)
            for row, negative in enumerate(columns.get("negative_prompt", ())):
                if negative.is_valid and has_lora_tags(negative.as_py()):
                    yield row, "the negative prompt names a LoRA; name it in the prompt, with a scale below 0"
        if COLUMN in columns:
            for index in np.flatnonzero(columns[COLUMN].is_valid().to_numpy(zero_copy_only=False)):
                yield from self._fault(int(index), parse_scales, columns[COLUMN])

    def notes(self) -> tuple[str, ...]:
        """What a user should know about the prompts, once they are read."""
        if not self._ignored:
            return ()
        return (f"{self._ignored:,} prompts have <lora:...>, and the job has no LoRA: it is read as text; give --lora",)

    def _fault(
        self, index: int, read: Callable[[str], Mapping[str, float]], texts: pa.Array
    ) -> Iterator[tuple[int, str]]:
        try:
            unknown = [name for name in read(texts[index].as_py()) if name not in self.defaults]
        except (FieldError, EngineError) as error:
            yield index, str(error)
        else:
            if unknown:
                yield index, self.unknown(unknown[0])

    def unknown(self, name: str) -> str:
        """The reason for refusing a LoRA that the job does not have."""
        near = nearest(name, self.defaults)
        return f"the job has no LoRA {shorten(name)}{near}; give --lora {name[:64]}=PLACE"


def row_loras(defaults: Mapping[str, float], syntax: str, axes: Sequence[str]) -> RowLoras:
    """The LoRAs of a job with these axes. Raises UsageError for the axis of a LoRA that it does not have."""
    loras = RowLoras(defaults, syntax)
    for axis in axes:
        name = lora_of_axis(axis)
        if name is not None and name not in loras.defaults:
            raise UsageError(f"sweep axis {axis}: {loras.unknown(name)}")
    return loras
