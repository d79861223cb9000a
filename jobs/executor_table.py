"""Where jobs can run. A new executor is one file in executors/ and one entry here; `--executor` takes its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorEntry:
    """An executor that is imported when it is used: `factory(job, runtime, engine_factory=...)` makes one."""

    factory: str
    """MODULE:NAME."""
    on_ray: bool = False
    """Whether it runs on a Ray cluster, which may have GPUs of several types, and to which jobs can be submitted."""
    starting: str | None = None
    """What a user is told while the factory works, where that takes seconds."""


EXECUTORS: Mapping[str, ExecutorEntry] = {
    "ray": ExecutorEntry(
        factory="latentmill.jobs.executors.ray:RayExecutor", on_ray=True, starting="starting Ray or joining it"
    ),
    "inline": ExecutorEntry(factory="latentmill.jobs.executors.inline:InlineExecutor"),
}
