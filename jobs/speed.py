"""How fast a run is, and how long the rest takes: measured in seconds of one worker, and divided among those at work.

Results of many workers come in bursts, so that counting those of the last minute says little. What a worker takes for
each of its chunks is steady: the time from its result before to this one. The time that is left follows from it, by
kind of chunk: what the kind's own chunks took lately or, before there is one, what others took for as much work.

A worker has two lanes that run beside each other: one thread samples, two finish what was sampled. The *fullest lane*,
which spends the greatest share of its threads' time at work, is what the run waits for, and the *slowest stage* is the
one with most seconds in it. A single stage of the other lane may take longer and yet nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.stages import Stage

LANES: tuple[tuple[int, tuple[Stage, ...]], ...] = (
    (1, ("reuse", "sample")),
    (2, ("check", "encode", "write", "commit")),
)
"""The lanes of a worker: threads, and the stages that they do one after the other. Loading is in none."""

HALF_LIFE = 60.0
"""A result counts half as much after so many seconds."""

_MOST_HALVINGS = 1 / 8
"""Of what was before, for each result: where chunks take minutes, the last dozen count."""

REGROUP_SECONDS = 30.0
"""For so long, workers that are missing count as loading the next model, and not as gone."""

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class WorkLeft:
    """Chunks that are not done, and their work, by kind."""

    chunks: NDArray[np.int64]
    work: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneChunk:
    """A chunk that a worker has brought to its end: its kind and work, its pictures, and how many of them it drew."""

    actor: str
    kind: int
    work: float
    pictures: int
    drawn: int
    stages: Mapping[Stage, float]


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """How much of its threads' time a stage takes, 0 to 1, and how many pictures a second it could do alone."""

    busy: float
    images_per_second: float


def stage_speeds(
    seconds: Mapping[Stage, float], *, pictures: float, worker_seconds: float, workers: int
) -> dict[Stage, StageSpeed]:
    """The stages of a run, the slowest one first, by what they took of some seconds of workers for some pictures."""
    shares: list[tuple[float, float, Stage, StageSpeed]] = []
    for threads, stages in LANES:
        lane = sum(seconds.get(stage, 0.0) for stage in stages) / threads
        for stage in stages:
            taken = seconds.get(stage, 0.0) / threads
            if taken > 0 and worker_seconds > 0:
                speed = StageSpeed(busy=min(1.0, taken / worker_seconds), images_per_second=pictures / taken * workers)
                shares.append((lane, taken, stage, speed))
    shares.sort(key=lambda share: share[:2], reverse=True)
    return {stage: speed for _, _, stage, speed in shares}


def slowest_first(seconds: Mapping[Stage, float]) -> dict[Stage, float]:
    """The same, the slowest stage first and the loading of models last."""
    order = list(stage_speeds(seconds, pictures=1.0, worker_seconds=1.0, workers=1))
    if "load" in seconds:
        order.append("load")
    return {stage: seconds[stage] for stage in order}


def own_seconds(stages: Mapping[Stage, float]) -> float:
    """How far apart chunks of such seconds come from a worker that does nothing else: its fuller lane decides."""
    return max(sum(stages.get(stage, 0.0) for stage in lane) / threads for threads, lane in LANES)


class Speed:
    """What chunks take, by kind; `models` has the model of each. A result costs a few operations at any size of job."""

    def __init__(self, models: NDArray[np.int64]) -> None:
        self._models = models
        self._left = WorkLeft(np.zeros(len(models), dtype=np.int64), np.zeros(len(models)))
        self._begun_pass = False
        self._seconds, self._work = np.zeros(len(models)), np.zeros(len(models))
        self._pictures = self._spent = 0.0
        self._stages: dict[Stage, float] = {}
        self._last: dict[str, float] = {}
        """When each worker's last chunk ended."""
        self._begun: set[int] = set()
        """Models that a chunk was drawn with."""
        self._load_seconds = 0.0
        self._workers = 1
        self._missing_since: float | None = None

    def begin(self, left: WorkLeft) -> None:
        """So much is left from now on; what workers did before says nothing of their next chunks' time."""
        self._left, self._begun_pass = left, True
        self._last.clear()

    def note_workers(self, live: int, now: float) -> int:
        """So many are ready now. Returned is how many count, one at least."""
        if live >= self._workers:
            self._workers, self._missing_since = live, None
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > REGROUP_SECONDS:
            self._workers, self._missing_since = max(1, live), None
        return self._workers

    def note_left(self, kind: int, work: float) -> None:
        """One chunk less is left."""
        self._left.chunks[kind] -= 1
        self._left.work[kind] = max(0.0, self._left.work[kind] - work)

    def note_found_done(self, actor: str, now: float) -> None:
        """A worker came to a chunk that somebody else had done."""
        self._remember(actor, now)

    def add(self, done: DoneChunk, now: float) -> float:
        """Learn from a chunk; the seconds that its worker took for it.

        One that other outputs had whole says nothing of those that have to be drawn, unless they are mixed.
        """
        seconds = self._seconds_of(done, now)
        keep = 0.5 ** min(seconds / (HALF_LIFE * self._workers), _MOST_HALVINGS)
        self._pictures = self._pictures * keep + done.pictures
        self._spent = self._spent * keep + seconds
        for stage in {*self._stages, *done.stages} - {"load"}:
            self._stages[stage] = self._stages.get(stage, 0.0) * keep + done.stages.get(stage, 0.0)
        if done.drawn or self._work[done.kind]:
            self._seconds[done.kind] = self._seconds[done.kind] * keep + seconds
            self._work[done.kind] = self._work[done.kind] * keep + done.work
            self._begun.add(int(self._models[done.kind]))
        return seconds

    @property
    def images_per_second(self) -> float:
        """Pictures of all workers together, lately."""
        return self._pictures / self._spent * self._workers if self._spent > 0 else 0.0

    @property
    def stages(self) -> dict[Stage, StageSpeed]:
        """How busy the stages were lately, the slowest one first."""
        return stage_speeds(self._stages, pictures=self._pictures, worker_seconds=self._spent, workers=self._workers)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes; None before it can be told."""
        n_chunks = int(self._left.chunks.sum())
        if not n_chunks:
            return 0.0 if self._begun_pass else None
        measured = self._work > 0
        if not measured.any():
            return None
        seconds = float((self._left.work * self._costs(measured)).sum())
        return (seconds + self._loading()) / min(self._workers, n_chunks)

    def _costs(self, measured: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Seconds of a worker for each unit of work: the kind's own, else its model's, else everybody's."""
        costs = np.full(len(measured), self._seconds.sum() / self._work.sum())
        for model in np.unique(self._models[measured]):
            own = self._models == model
            costs[own] = self._seconds[own].sum() / self._work[own].sum()
        costs[measured] = self._seconds[measured] / self._work[measured]
        return costs

    def _loading(self) -> float:
        """Seconds of workers for the models that are still to be loaded, if the last ones took as long."""
        if not self._load_seconds:
            return 0.0
        to_come = {int(model) for model in np.unique(self._models[self._left.chunks > 0])} - self._begun
        chunks = (int(self._left.chunks[self._models == model].sum()) for model in to_come)
        return self._load_seconds * sum(min(self._workers, n_chunks) for n_chunks in chunks)

    def _seconds_of(self, done: DoneChunk, now: float) -> float:
        """What the worker took, from its chunk before to this one, but for the loading of a model."""
        before = self._last.get(done.actor)
        self._remember(done.actor, now)
        if "load" in done.stages:
            self._load_seconds = done.stages["load"]
            return own_seconds(done.stages)
        return own_seconds(done.stages) if before is None else now - before

    def _remember(self, actor: str, now: float) -> None:
        self._last.pop(actor, None)
        self._last[actor] = now
        if len(self._last) > 4 * self._workers + _REMEMBERED:  # processes that died
            del self._last[next(iter(self._last))]
