"""How strongly each LoRA of a job counts in a row, and what is wrong with rows that say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.engine import EngineError, has_lora_tags, lora_tags
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import FieldError, Value, nearest, shorten
from latentmill.jobs.manifests.loras import AXIS_PREFIX, COLUMN, lora_of_axis, parse_scales


class RowLoras:
    """How strongly each LoRA of a job counts in a row: by the axis, else the column, else the prompt, else the flag.

    `defaults` are the flags' scales by name. Prompts name LoRAs only where their syntax is A1111's and the job has any.
    """

    def __init__(self, defaults: Mapping[str, float], syntax: str) -> None:
        self.defaults = dict(sorted(defaults.items()))
        self.reads_tags = bool(defaults) and syntax == "a1111"
        self._plain = syntax != "a1111"
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
        if not self.reads_tags:
            self._ignored += int(pc.sum(tagged).as_py() or 0)
        else:
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
        found = f"{self._ignored:,} prompts have <lora:...>"
        if self._plain:
            return (f"{found}, which is read as text; to draw with LoRAs, say --prompt-syntax a1111 and give --lora",)
        return (f"{found}, and the job has no LoRA: it is read as text; give --lora",)

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
