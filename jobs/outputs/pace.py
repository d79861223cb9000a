"""How fast a job is by its ledger alone: when chunks were committed, and what the newest records say of their making.

It needs no word from whoever runs the job, so it is the same for one driver, for eight shards, and for a dead one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.ledger.records import CommitRecord
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.plans.work import ChunkWork
from latentmill.jobs.speed import own_seconds, slowest_first
from latentmill.jobs.stages import Stage, stages_of

WINDOW_SECONDS = 600.0
"""Commits of so long make the rate, and at least the newest few."""

FEWEST, MOST = 64, 4096
"""So many of the newest commits count, whatever their age."""

SILENCE_SECONDS = 120.0
"""The shortest time without a commit that counts as a pause: four times the usual distance of commits, else."""

WORKERS_SECONDS = 300.0
"""Workers whose commits are not older count as at work."""

_RECORDS_KEPT = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What the ledger says of a job's speed at one moment.

    `stage_seconds` are a worker's for one picture, the slowest stage first, and `workers` those that the newest records
    are of, as far as they were read. `stalled`: nothing was committed for much longer than is usual here; then there is
    no time to be told.
    """

    images_per_second: float = 0.0
    eta_seconds: float | None = None
    last_commit: float | None = None
    """In seconds since 1970, by the store's clock."""
    silent_seconds: float | None = None
    stalled: bool = False
    workers: int = 0
    stage_seconds: Mapping[Stage, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Made:
    """What a record says of how its chunk was made."""

    committed: float
    samples: int
    actor: str
    stages: Mapping[Stage, float]


class PaceOfLedger:
    """Reads the speed of a job out of its commits and of a few of its records."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._work = ChunkWork(plan.grid, plan.batch_size)
        self._made: deque[_Made] = deque(maxlen=_RECORDS_KEPT)

    def note(self, record: CommitRecord, committed: float) -> None:
        """Take in what a record says; the newest ones last."""
        actor = record.metadata.get("actor", "")
        self._made.append(_Made(committed, record.table.num_rows, actor, stages_of(record.metadata)))

    def at(self, times: NDArray[np.float64], now: float) -> Pace:
        """The pace, by the commits' times (NaN where there is none) and the clock."""
        committed = ~np.isnan(times)
        chunks = newest_chunks(times)
        if not len(chunks):
            return Pace()
        last = float(times[chunks[-1]])
        silent = max(0.0, now - last)
        lately = [made for made in self._made if last - made.committed <= WORKERS_SECONDS]
        usual = max((own_seconds(made.stages) for made in lately), default=0.0)
        stalled = not committed.all() and silent > max(pause_seconds(times[chunks]), 3 * usual)
        rate = work_rate = None
        if not stalled:
            chunks = since_pause(chunks, times)
            rate = _slope(times[chunks], [self._plan.grid.pace_of(chunk)[1] for chunk in chunks.tolist()])
            work_rate = _slope(times[chunks], [self._work.of(chunk)[1] for chunk in chunks.tolist()])
        left = float(self._work.left(~committed).work.sum())
        return Pace(
            images_per_second=rate or 0.0,
            eta_seconds=0.0 if committed.all() else max(0.0, left / work_rate - silent) if work_rate else None,
            last_commit=last,
            silent_seconds=silent,
            stalled=stalled,
            workers=len({made.actor for made in lately}),
            stage_seconds=seconds_by_stage(
                [made.stages for made in self._made], sum(made.samples for made in self._made)
            ),
        )


def seconds_by_stage(chunks: Sequence[Mapping[Stage, float]], n_samples: int) -> dict[Stage, float]:
    """Seconds of a worker for one picture, but for the loading of the model; the slowest stage first."""
    total: dict[Stage, float] = {}
    for stages in chunks:
        for stage, seconds in stages.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: seconds / n_samples for stage, seconds in slowest_first(total).items() if stage != "load"}


def newest_chunks(times: NDArray[np.float64]) -> NDArray[np.int64]:
    """The chunks that were committed last, in order of time: those of ten minutes, and at least some."""
    chunks = np.flatnonzero(~np.isnan(times))
    if len(chunks) > MOST:
        chunks = chunks[np.argpartition(times[chunks], -MOST)[-MOST:]]
    chunks = chunks[np.argsort(times[chunks], kind="stable")]
    recent = int(np.count_nonzero(times[chunks] >= times[chunks[-1]] - WINDOW_SECONDS)) if len(chunks) else 0
    return chunks[-max(recent, FEWEST) :]


def pause_seconds(times: NDArray[np.float64]) -> float:
    """From how long on a silence is a pause, by the usual distances of these commits."""
    gaps = np.diff(times)
    return max(SILENCE_SECONDS, 4 * float(np.quantile(gaps, 0.9, method="lower")) if len(gaps) else 0.0)


def since_pause(chunks: NDArray[np.int64], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Those of the chunks, in order of time, that were committed after the last pause: a job may have been resumed."""
    pauses = np.flatnonzero(np.diff(times[chunks]) > pause_seconds(times[chunks]))
    return chunks[pauses[-1] + 1 :] if len(pauses) else chunks


def _slope(times: NDArray[np.float64], amounts: Sequence[float]) -> float | None:
    """How much comes in a second: the line that fits the sums best, which bursts hardly bend. None if there is none."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    from_mean = times - times.mean()
    return float((from_mean * np.cumsum(amounts)).sum() / (from_mean**2).sum())
