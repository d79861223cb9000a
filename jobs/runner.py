"""Run a job until nothing is left: plan, adopt, execute what the ledger lacks, publish."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.donors import find_donors
from latentmill.jobs.errors import JobError, OutputConflictError
from latentmill.jobs.executor_table import EXECUTORS
from latentmill.jobs.executors.base import Executor, open_executor
from latentmill.jobs.interrupt import Interrupt, graceful_interrupt
from latentmill.jobs.job import Job, Reuse, open_job
from latentmill.jobs.outputs.failures import FailedRow, failed_rows
from latentmill.jobs.outputs.latest import Latest, point_to_latest
from latentmill.jobs.outputs.publish import Publication, publish, standing_publication
from latentmill.jobs.plans.plan import Plan, adopt, draft_plan
from latentmill.jobs.progress import Progress, Tracker
from latentmill.jobs.spec import JobSpec, Runtime
from latentmill.jobs.stages import Stage
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import EngineFactory, load_engine

PASSES_WITHOUT_PROGRESS = 3
"""Passes over the open chunks that may end without one new commit before the job gives up."""

SHARD_DONE = 4
"""The exit code of a shard whose own chunks are committed while others' are not: nothing is published yet."""

MOST_NOTES = 20
"""So many notes of workers are told."""

RESUME = "run the same command again: it resumes"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """How a run ended. `counts` are those of the published dataset, None if the run stopped before that.

    `latest` is where the pointer of a dated job is now. More than one of `execution_classes` means that a resume, or
    another kind of GPU, took part: each row's bits are its own class's.
    """

    exit_code: int
    out: str
    executor: str
    samples: int
    rejected_rows: int
    counts: dict[str, int] | None
    generated: int
    """Samples that this run drew; `reused` were taken from other outputs."""
    seconds: float
    images_per_second: float
    next_command: str
    failures: tuple[FailedRow, ...]
    """The first of the samples that failed, by the published dataset."""
    left_out: tuple[str, ...] = ()
    """Nodes that could not take part, with the reason."""
    execution_classes: tuple[str, ...] = ()
    latest: Latest | None = None
    notes: tuple[str, ...] = ()
    """What is odd about the manifest that was accepted all the same."""
    shard: str | None = None
    reused: int = 0
    stage_seconds: Mapping[Stage, float] = field(default_factory=dict)
    """Of all workers of this run together; the slowest stage first, the loading of models last."""
    gpu_seconds: float = 0.0
    """What the workers took for chunks and for loading models, times `gpus_per_actor`, or 1 where that is not given."""
    cost: float | None = None
    """Of the GPUs, where `gpu_hour_price` is set."""


def run_job(
    spec: JobSpec,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_stop: Callable[[], None] = lambda: None,
    on_stage: Callable[[str], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    on_plan: Callable[[Plan, int], None] = lambda _plan, _committed: None,
    engine_factory: EngineFactory = load_engine,
) -> RunSummary:
    """Afterwards the dataset is published (exit code 0, or 1 with failed samples), or the job can be resumed (130).

    A shard that ends before the others are done publishes nothing (`SHARD_DONE`).

    The first SIGINT or SIGTERM calls `on_stop` and lets the chunks in flight finish, the second stops at once. Raises
    UsageError or OutputConflictError before anything is written or any model is loaded, JobError when open chunks keep
    failing. With `spec.runtime.retry_failed`, samples that failed are made once more. `on_stage` hears what a phase
    waits for, `on_note` what is odd about the manifest, `on_plan` the plan and how many chunks are committed.
    """
    started = time.monotonic()
    with graceful_interrupt(on_stop) as interrupt:
        job, notes = _adopt(spec, on_stage, on_note)
        mine = _chunks_of_shard(job.plan.n_chunks, spec.runtime.shard)
        tracker = Tracker(job.plan, mine, on_progress)
        told = _Told(on_note)
        publication = standing_publication(job)
        where, left_out = "nothing to do", tuple[str, ...]()
        committed = job.ledger.committed() if publication is None else np.ones(job.plan.n_chunks, dtype=np.bool_)
        on_plan(job.plan, int(committed.sum()))
        retrying = spec.runtime.retry_failed and (publication is None or publication.counts["failed"] > 0)
        try:
            if retrying or not committed[mine].all():
                tracker.show("starting")
                starting = EXECUTORS[spec.runtime.executor].starting
                if starting is not None:
                    on_stage(starting)
                executor = open_executor(job, spec.runtime, engine_factory)
                where = executor.describe()
                on_stage("loading the model")
                with closing(executor), interrupt.stopping(executor):
                    committed = _execute(job, committed, mine, executor, tracker, interrupt, told)
                    if retrying:
                        _repair(job, mine, executor, tracker, interrupt)
                    left_out = tuple(executor.left_out())
            if committed.all() or job.ledger.committed().all():  # by a last look: of all shards, one sees the end
                tracker.show("publishing")
                publication = publish(job)
        except KeyboardInterrupt:
            summary = _summary(job, spec.runtime, tracker, None, where, time.monotonic() - started, exit_code=130)
            return replace(summary, notes=(*notes, *told.notes))
    tracker.show("done")
    exit_code = SHARD_DONE if publication is None else 1 if publication.counts["failed"] else 0
    latest = point_to_latest(spec.dated) if spec.dated is not None and exit_code == 0 else None
    summary = _summary(job, spec.runtime, tracker, publication, where, time.monotonic() - started, exit_code=exit_code)
    return replace(summary, latest=latest, left_out=left_out, notes=(*notes, *told.notes), shard=spec.runtime.shard)


class _Told:
    """What workers say of cells that they could not take: each once, and not more than a few of them."""

    def __init__(self, on_note: Callable[[str], None]) -> None:
        self._on_note = on_note
        self.notes: list[str] = []

    def add(self, notes: Sequence[str]) -> None:
        for note in notes:
            if note in self.notes or len(self.notes) > MOST_NOTES:
                continue
            if len(self.notes) == MOST_NOTES:
                note = "more cells of other outputs are drawn anew, for such reasons"  # noqa: PLW2901 - the last one that is told
            self.notes.append(note)
            self._on_note(note)


def _adopt(
    spec: JobSpec, on_stage: Callable[[str], None], on_note: Callable[[str], None]
) -> tuple[Job, tuple[str, ...]]:
    """The job's output, checked to be writable and to belong to this very plan, and the notes on its manifest."""
    with draft_plan(spec, on_stage=on_stage) as draft:
        for note in draft.notes:
            on_note(note)
        on_stage("opening the output")
        link = spec.runtime.reuse_by == "link"
        donors = find_donors(spec.runtime.reuse, spec.out, link=link)
        storage = Storage.open(spec.out).probe(allow_single_writer=spec.runtime.single_writer)
        adopt(draft, storage)
        storage.mark_single_writer()  # after the plan: an output of another plan has been refused by now
    job = open_job(spec.out)
    donors = donors.of(job.plan)
    for note in donors.notes:
        on_note(note)
    return replace(job, reuse=Reuse(donors=donors.urls, link=link)), (*draft.notes, *donors.notes)


def _chunks_of_shard(n_chunks: int, shard: str | None) -> NDArray[np.bool_]:
    """The chunks that are this run's: all, or for I/N every Nth from the Ith on, so that each size is spread evenly."""
    number, count = (1, 1) if shard is None else map(int, shard.split("/"))
    mine = np.zeros(n_chunks, dtype=np.bool_)
    mine[number - 1 :: count] = True
    return mine


def _execute(
    job: Job,
    committed: NDArray[np.bool_],
    mine: NDArray[np.bool_],
    executor: Executor,
    tracker: Tracker,
    interrupt: Interrupt,
    told: _Told,
) -> NDArray[np.bool_]:
    """Run passes until all of `mine` are committed. Returns what is, by the last look; KeyboardInterrupt if stopped."""
    idle_passes = 0
    while not committed[mine].all():
        tracker.begin_pass(committed, executor.live_actors)
        pending: list[int] = np.flatnonzero(mine & ~committed).tolist()
        with closing(_results(executor, pending, repair=False)) as results:
            for result in results:
                tracker.add(result)
                told.add(result.notes)
        before, committed = committed, job.ledger.committed()
        if interrupt.asked and not committed[mine].all():
            raise KeyboardInterrupt
        idle_passes = idle_passes + 1 if committed[mine].sum() == before[mine].sum() else 0
        _give_up_after(idle_passes, len(pending), tracker)
    return committed


def _repair(job: Job, mine: NDArray[np.bool_], executor: Executor, tracker: Tracker, interrupt: Interrupt) -> None:
    """Make the samples that failed once more: each of their chunks comes to an end once, whatever the outcome."""
    idle_passes = 0
    pending = {chunk for chunk in job.ledger.failed_chunks() if mine[chunk]}
    while pending:
        tracker.begin_repair(sorted(pending), executor.live_actors)
        before = len(pending)
        with closing(_results(executor, sorted(pending), repair=True)) as results:
            for result in results:
                tracker.add(result)
                if result.done:
                    pending.discard(result.chunk)
        if interrupt.asked and pending:
            raise KeyboardInterrupt
        idle_passes = idle_passes + 1 if len(pending) == before else 0
        _give_up_after(idle_passes, len(pending), tracker)


def _give_up_after(idle_passes: int, n_pending: int, tracker: Tracker) -> None:
    if idle_passes == PASSES_WITHOUT_PROGRESS:
        raise JobError(
            f"{n_pending} chunks are still open after {idle_passes} passes without a new commit; the last error was: "
            f"{tracker.last_error or 'none was reported'}; correct it and run the same command again"
        )


def _results(executor: Executor, chunks: list[int], *, repair: bool) -> Generator[ChunkResult]:
    """The executor's results, until one says that going on is useless: those in flight may still commit."""
    for result in executor.run(chunks, repair=repair):
        if result.blame == "conflict":
            raise OutputConflictError(result.error)
        if result.blame == "store":
            raise StorageError(result.error or "")
        yield result


def _next_command(out: str, exit_code: int) -> str:
    if exit_code == 130:
        return RESUME
    return f"latentmill {'status' if exit_code == SHARD_DONE else 'report'} {shlex.quote(out)}"


def _summary(
    job: Job,
    runtime: Runtime,
    tracker: Tracker,
    publication: Publication | None,
    where: str,
    seconds: float,
    *,
    exit_code: int,
) -> RunSummary:
    out, price = job.storage.url, runtime.gpu_hour_price
    gpu_seconds = tracker.worker_seconds * (1.0 if runtime.gpus_per_actor is None else runtime.gpus_per_actor)
    return RunSummary(
        exit_code=exit_code,
        out=out,
        executor=where,
        samples=job.plan.n_samples,
        rejected_rows=job.plan.n_rejected,
        counts=None if publication is None else publication.counts,
        generated=tracker.generated,
        reused=tracker.reused,
        seconds=seconds,
        images_per_second=tracker.generated / seconds if seconds > 0 else 0.0,
        next_command=_next_command(out, exit_code),
        failures=() if publication is None else failed_rows(job, publication),
        execution_classes=() if publication is None else publication.execution_classes,
        stage_seconds=tracker.stage_seconds,
        gpu_seconds=gpu_seconds,
        cost=None if price is None else gpu_seconds / 3600 * price,
    )
