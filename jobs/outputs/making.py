"""How a published dataset was made, from its ledger: how long it took, the seconds by stage, the workers' time."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.commit_times import CommitTimes
from latentmill.jobs.ledger.records import CommitRecord
from latentmill.jobs.outputs.pace import pause_seconds
from latentmill.jobs.outputs.publish import Publication
from latentmill.jobs.speed import own_seconds, slowest_first
from latentmill.jobs.stages import Stage, stages_of

MAX_RECORDS_READ = 64
"""Commit records that the seconds by stage come from, spread over all chunks."""

_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """How a dataset was made. The seconds of stages and workers are those of all workers together.

    They come from `records_read` of the records; where those are not all, they are as many times as much, and without
    the loading of models. None stands for what no metadata say. `seconds` are those from the first chunk's beginning to
    the last commit, without `pauses`.
    """

    execution_classes: tuple[str, ...]
    seconds: float
    pauses: int
    images_per_second: float | None
    stage_seconds: Mapping[Stage, float]
    """The slowest stage first, the loading of models last."""
    worker_seconds: float | None
    records_read: int
    records: int


def how_made(job: Job, publication: Publication, commits: CommitTimes) -> Making:
    """What the ledger of a published dataset says of its making, by its commits' times and a few records."""
    times = np.sort(commits.times[commits.committed])
    gaps = np.diff(times)
    pauses = gaps[gaps > pause_seconds(times)]
    chunks: list[int] = np.flatnonzero(commits.committed).tolist()
    chosen = chunks[:: max(1, -(-len(chunks) // MAX_RECORDS_READ))]
    with ThreadPoolExecutor(_THREADS) as pool:
        read = [record for record in pool.map(lambda chunk: _read(job, chunk), chosen) if record is not None]
    told = [stages for record in read if (stages := stages_of(record.metadata))]
    scale = len(chunks) / len(told) if told else 0.0
    all_told = len(told) == len(chunks)
    total: dict[Stage, float] = {}
    for stages in told:
        for stage, taken in stages.items():
            if stage != "load" or all_told:  # few chunks have it, so that some of them say nothing of the others
                total[stage] = total.get(stage, 0.0) + taken * scale
    working = sum(map(own_seconds, told))
    seconds = float(gaps.sum() - pauses.sum()) + (working / len(told) if told else 0.0)
    return Making(
        execution_classes=publication.execution_classes,
        seconds=seconds,
        pauses=len(pauses),
        images_per_second=publication.rows / seconds if seconds > 0 else None,
        stage_seconds=slowest_first(total),
        worker_seconds=working * scale + total.get("load", 0.0) if told else None,
        records_read=len(told),
        records=len(chunks),
    )


def _read(job: Job, chunk: int) -> CommitRecord | None:
    """The record, if it can be read: what is wrong with it is for `verify` to say."""
    try:
        return job.ledger.read(chunk)
    except JobError:
        return None
