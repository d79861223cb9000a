"""How far a run is: results of chunks added up, for display."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.plans.work import ChunkWork
from latentmill.jobs.speed import DoneChunk, Speed, StageSpeed, WorkLeft, slowest_first
from latentmill.jobs.stages import Stage

Phase = Literal["planning", "starting", "generating", "publishing", "done"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. `done` counts samples in the ledger; the three statuses count this run's own.

    `eta_seconds` is what the rest takes, from `made_at` on by the monotonic clock.
    """

    phase: Phase
    done: int
    total: int
    ok: int
    flagged: int
    failed: int
    chunks_done: int
    chunks_total: int
    actors: int
    images_per_second: float
    eta_seconds: float | None
    stages: Mapping[Stage, StageSpeed] = field(default_factory=dict)
    """How busy each stage is, the slowest one first."""
    made_at: float = 0.0

    def eta_at(self, now: float) -> float | None:
        """What the rest takes from a later moment on, if nothing was heard since."""
        return None if self.eta_seconds is None else max(0.0, self.eta_seconds - (now - self.made_at))


class _Chunks(Protocol):
    """Which chunks take about as long as each other."""

    def of(self, chunk: int) -> tuple[int, float]: ...
    def left(self, still_open: NDArray[np.bool_]) -> WorkLeft: ...


class _Repairs:
    """Chunks to be repaired, of which nobody knows how many rows failed: all of a model count the same."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def of(self, chunk: int) -> tuple[int, float]:
        return self._plan.model_of(chunk), 1.0

    def left(self, still_open: NDArray[np.bool_]) -> WorkLeft:
        models = [self._plan.model_of(chunk) for chunk in np.flatnonzero(still_open).tolist()]
        chunks = np.bincount(models, minlength=len(self._plan.models))
        return WorkLeft(chunks, chunks.astype(np.float64))


class Tracker:
    """Adds up results into Progress."""

    def __init__(
        self,
        plan: Plan,
        chunks: NDArray[np.bool_],
        on_progress: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._chunks = chunks
        """Those that this run makes: all, or a shard's."""
        self._n_samples = plan.samples_in_chunks(chunks)
        self._n_chunks = int(chunks.sum())
        self._on_progress = on_progress
        self._clock = clock
        self._live_actors: Callable[[], int] = lambda: 0
        self._done = np.zeros(plan.n_chunks, dtype=np.bool_)
        self._chunks_done = self._samples_done = 0
        work = ChunkWork(plan.grid, plan.batch_size)
        self._work: _Chunks = work
        self._speed = Speed(work.models)
        self.counts = {"ok": 0, "flagged": 0, "failed": 0}
        self.generated = 0
        self.reused = 0
        self.last_error: str | None = None
        self.worker_seconds = 0.0
        """What workers took for their chunks, and for loading models."""
        self._stage_seconds: dict[Stage, float] = {}
        self.show("planning")

    @property
    def stage_seconds(self) -> Mapping[Stage, float]:
        """Of all workers together, the slowest stage first."""
        return slowest_first(self._stage_seconds)

    def begin_pass(self, committed: NDArray[np.bool_], live_actors: Callable[[], int]) -> None:
        done = committed & self._chunks
        self._begin(done, self._chunks & ~done, live_actors)

    def begin_repair(self, pending: Sequence[int], live_actors: Callable[[], int]) -> None:
        """Every chunk is committed; what a repair makes is only counted as generated."""
        if not isinstance(self._work, _Repairs):
            self._work, self._speed = _Repairs(self._plan), Speed(np.arange(len(self._plan.models)))
        still_open = np.zeros(self._plan.n_chunks, dtype=np.bool_)
        still_open[list(pending)] = True
        self._begin(self._chunks, still_open, live_actors)

    def _begin(self, done: NDArray[np.bool_], still_open: NDArray[np.bool_], live_actors: Callable[[], int]) -> None:
        self._live_actors = live_actors
        self._done = done.copy()
        self._chunks_done = int(done.sum())
        self._samples_done = self._plan.samples_in_chunks(done)
        self._speed.begin(self._work.left(still_open))
        self.show("starting")

    def add(self, result: ChunkResult) -> None:
        now = self._clock()
        self._speed.note_workers(self._live_actors(), now)
        samples = result.ok + result.flagged + result.failed
        if result.outcome in {"committed", "lost", "unrepaired"}:
            self.generated += samples - result.reused
            self.reused += result.reused
        self._learn(result, samples, now)
        if result.done and not self._done[result.chunk]:
            self._done[result.chunk] = True
            self._chunks_done += 1
            self._samples_done += samples
            for status in self.counts:
                self.counts[status] += getattr(result, status)
        self.last_error = result.error or self.last_error
        self.show("generating")

    def _learn(self, result: ChunkResult, samples: int, now: float) -> None:
        """What the result says of the time that is left."""
        if not result.done:
            return
        kind, work = self._work.of(result.chunk)
        if isinstance(self._work, _Repairs) or not self._done[result.chunk]:
            self._speed.note_left(kind, work)
        if not result.actor:  # nobody drew it: its model cannot be loaded
            return
        if result.outcome == "already":
            self._speed.note_found_done(result.actor, now)
            return
        for stage, seconds in result.stages.items():
            self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + seconds
        self.worker_seconds += result.stages.get("load", 0.0)
        self.worker_seconds += self._speed.add(
            DoneChunk(
                actor=result.actor,
                kind=kind,
                work=work,
                pictures=samples,
                drawn=samples - result.reused,
                stages=result.stages,
            ),
            now,
        )

    def show(self, phase: Phase) -> None:
        now = self._clock()
        live = self._live_actors()
        self._on_progress(
            Progress(
                phase=phase,
                done=self._samples_done,
                total=self._n_samples,
                **self.counts,
                chunks_done=self._chunks_done,
                chunks_total=self._n_chunks,
                actors=live,
                images_per_second=self._speed.images_per_second,
                eta_seconds=self._speed.seconds_left,
                stages=self._speed.stages,
                made_at=now,
            )
        )
