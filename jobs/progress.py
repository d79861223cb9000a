"""How far a run is: results of chunks added up, for display."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.stages import work_seconds

Phase = Literal["planning", "starting", "generating", "publishing", "done"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. `done` counts samples in the ledger; the three statuses count this run's own."""

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


class Tracker:
    """Adds up results into Progress."""

    def __init__(self, plan: Plan, chunks: NDArray[np.bool_], on_progress: Callable[[Progress], None]) -> None:
        self._plan = plan
        self._chunks = chunks
        """Those that this run makes: all, or a shard's."""
        self._n_samples = plan.samples_in_chunks(chunks)
        self._on_progress = on_progress
        self._live_actors: Callable[[], int] = lambda: 0
        self._done = np.zeros(plan.n_chunks, dtype=np.bool_)
        self._samples_done = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=32)
        self.counts = {"ok": 0, "flagged": 0, "failed": 0}
        self.generated = 0
        self.reused = 0
        self.last_error: str | None = None
        self.show("planning")

    def begin_pass(self, committed: NDArray[np.bool_], live_actors: Callable[[], int]) -> None:
        self._live_actors = live_actors
        self._done = committed & self._chunks
        self._samples_done = self._plan.samples_in_chunks(self._done)
        self._recent.clear()
        self._recent.append((time.monotonic(), 0))
        self.show("starting")

    def begin_repair(self, live_actors: Callable[[], int]) -> None:
        """Every chunk is committed; what a repair makes is only counted as generated."""
        self.begin_pass(self._chunks, live_actors)

    def add(self, result: ChunkResult) -> None:
        samples = result.ok + result.flagged + result.failed
        if result.outcome in {"committed", "lost", "unrepaired"}:
            self.generated += samples - result.reused
            self.reused += result.reused
            if len(self._recent) == 1:  # loading the model does not belong to the rate
                self._recent[0] = (time.monotonic() - work_seconds(result.stages), 0)
            self._recent.append((time.monotonic(), samples))
        if result.done and not self._done[result.chunk]:
            self._done[result.chunk] = True
            self._samples_done += samples
            for status in self.counts:
                self.counts[status] += getattr(result, status)
        self.last_error = result.error or self.last_error
        self.show("generating")

    @property
    def rate(self) -> float:
        """Images per second over the last results."""
        if len(self._recent) < 2:
            return 0.0
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(samples for _, samples in list(self._recent)[1:]) / seconds if seconds > 0 else 0.0

    def show(self, phase: Phase) -> None:
        left = self._n_samples - self._samples_done
        self._on_progress(
            Progress(
                phase=phase,
                done=self._samples_done,
                total=self._n_samples,
                **self.counts,
                chunks_done=int(self._done.sum()),
                chunks_total=int(self._chunks.sum()),
                actors=self._live_actors(),
                images_per_second=self.rate,
                eta_seconds=left / self.rate if self.rate > 0 else None,
            )
        )
