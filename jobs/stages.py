"""The stages that a chunk goes through, each named once, and how long one chunk took in each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Stage = Literal["load", "reuse", "sample", "check", "encode", "write", "commit"]

STAGES: Mapping[Stage, str] = {
    "load": "loading the model; told with the first chunk that it draws",
    "reuse": "taking what other outputs have",
    "sample": "text encoder, denoising and decoding, on the model's device",
    "check": "the safety checker",
    "encode": "the watermark, its reading back, and the PNG",
    "write": "the pictures, to the store",
    "commit": "the commit record, to the store",
}
"""In the order of a chunk. All but `load` grow with the number of chunks."""

_RECORD_KEY = "stage_seconds"
_OLD_RECORD_KEY = "generate_seconds"


class StageClock:
    """Seconds of one chunk by stage, as they add up; a stage that it did not go through is not there."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = {}

    def add(self, stage: Stage, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """What runs within counts for that stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def details(self) -> dict[str, str]:
        """The seconds so far, for the file metadata of the chunk's record."""
        return {
            _OLD_RECORD_KEY: f"{self.seconds.get('sample', 0.0):.3f}",
            _RECORD_KEY: json.dumps({stage: round(seconds, 4) for stage, seconds in self.seconds.items()}),
        }


def stages_of(metadata: Mapping[str, str]) -> dict[Stage, float]:
    """Seconds by stage of the chunk with a record of these file metadata, but for those of its own `commit`.

    Of records from before there were stages, those of `sample` alone; of what no worker wrote, nothing.
    """
    try:
        told = json.loads(metadata.get(_RECORD_KEY) or "{}") or {"sample": float(metadata.get(_OLD_RECORD_KEY, "nan"))}
        found = {stage: float(told[stage]) for stage in STAGES if stage in told}
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {}
    return {stage: seconds for stage, seconds in found.items() if 0 <= seconds < math.inf}


def work_seconds(stages: Mapping[Stage, float]) -> float:
    """What the chunk itself took, without the loading of a model."""
    return sum(seconds for stage, seconds in stages.items() if stage != "load")
