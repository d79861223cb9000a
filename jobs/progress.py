"""How far a run is: receipts added up, for whoever shows it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.executors.base import Executor
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.worker import Receipt

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
    """Adds up receipts into Progress."""

    def __init__(self, plan: Plan, on_progress: Callable[[Progress], None]) -> None:
        self._plan = plan
        self._on_progress = on_progress
        self._executor: Executor | None = None
        self._done = np.zeros(plan.n_chunks, dtype=np.bool_)
        self._samples_done = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=32)
        self.counts = {"ok": 0, "flagged": 0, "failed": 0}
        self.generated = 0
        self.last_error: str | None = None
        self.show("planning")

    def begin_pass(self, committed: NDArray[np.bool_], executor: Executor) -> None:
        self._executor = executor
        self._done = committed.copy()
        self._samples_done = self._plan.samples_in_chunks(committed)
        self._marks.clear()
        self._marks.append((time.monotonic(), 0))
        self.show("starting")

    def begin_repair(self, executor: Executor) -> None:
        """Every chunk is committed; what a repair makes is counted as generated alone."""
        self.begin_pass(np.ones(self._plan.n_chunks, dtype=np.bool_), executor)

    def add(self, receipt: Receipt) -> None:
        samples = receipt.ok + receipt.flagged + receipt.failed
        if receipt.outcome in {"committed", "lost", "unrepaired"}:
            self.generated += samples
            if len(self._marks) == 1:  # loading the model does not belong to the rate
                self._marks[0] = (time.monotonic() - receipt.generate_seconds - receipt.finish_seconds, 0)
            self._marks.append((time.monotonic(), samples))
        if receipt.done and not self._done[receipt.chunk]:
            self._done[receipt.chunk] = True
            self._samples_done += samples
            for status in self.counts:
                self.counts[status] += getattr(receipt, status)
        self.last_error = receipt.error or self.last_error
        self.show("generating")

    @property
    def rate(self) -> float:
        """Images per second over the last receipts."""
        if len(self._marks) < 2:
            return 0.0
        seconds = self._marks[-1][0] - self._marks[0][0]
        return sum(samples for _, samples in list(self._marks)[1:]) / seconds if seconds > 0 else 0.0

    def show(self, phase: Phase) -> None:
        left = self._plan.n_samples - self._samples_done
        self._on_progress(
            Progress(
                phase=phase,
                done=self._samples_done,
                total=self._plan.n_samples,
                **self.counts,
                chunks_done=int(self._done.sum()),
                chunks_total=self._plan.n_chunks,
                actors=self._executor.live_actors() if self._executor is not None else 0,
                images_per_second=self.rate,
                eta_seconds=left / self.rate if self.rate > 0 else None,
            )
        )
