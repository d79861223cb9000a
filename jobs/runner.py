"""Run a job until nothing is left: plan, adopt, execute what the ledger lacks, publish."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from latentmill.jobs.errors import JobError, OutputConflictError
from latentmill.jobs.executors.base import Executor
from latentmill.jobs.interrupt import Interrupt, graceful_interrupt
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.outputs.failures import FailedRow, failed_rows
from latentmill.jobs.outputs.latest import Latest, point_to_latest
from latentmill.jobs.outputs.publish import Publication, publish, standing_publication
from latentmill.jobs.plans.plan import Plan, adopt, draft_plan
from latentmill.jobs.progress import Progress, Tracker
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import EngineFactory, Receipt, load_engine

PASSES_WITHOUT_PROGRESS = 3
"""Passes over the open chunks that may end without one new commit before the job gives up."""

RESUME = "run the same command again: it resumes"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """How a run ended. `counts` are those of the published dataset, None if the run stopped before that.

    `latest` is where the pointer of a nightly job is now. More than one of `execution_classes` means that a resume, or
    another kind of GPU, took part: each row's bits are its own class's.
    """

    exit_code: int
    out: str
    executor: str
    samples: int
    rejected_rows: int
    counts: dict[str, int] | None
    generated: int
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


def run_job(
    spec: JobSpec,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_stop: Callable[[], None] = lambda: None,
    on_stage: Callable[[str], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    engine_factory: EngineFactory = load_engine,
) -> RunSummary:
    """Afterwards the dataset is published (exit code 0, or 1 with failed samples), or the job can be resumed (130).

    The first SIGINT or SIGTERM calls `on_stop` and lets the chunks in flight finish, the second stops at once. Raises
    UsageError or OutputConflictError before anything is written or any model is loaded, JobError when open chunks keep
    failing. With `spec.runtime.retry_failed`, samples that failed are made once more. `on_stage` hears what a phase
    waits for, `on_note` what is odd about the manifest.
    """
    started = time.monotonic()
    with graceful_interrupt(on_stop) as interrupt:
        job, notes = _adopt(spec, on_stage, on_note)
        tracker = Tracker(job.plan, on_progress)
        publication = standing_publication(job)
        where, left_out = "nothing to do", tuple[str, ...]()
        try:
            if publication is None or (spec.runtime.retry_failed and publication.counts["failed"]):
                tracker.show("starting")
                if spec.runtime.executor == "ray":
                    on_stage("starting Ray or joining it")
                executor = _open_executor(spec, job.plan, engine_factory)
                where = executor.describe()
                on_stage("loading the model")
                with closing(executor), interrupt.stopping(executor):
                    _execute(job, spec.out, executor, tracker, interrupt)
                    if spec.runtime.retry_failed:
                        _repair(job, spec.out, executor, tracker, interrupt)
                    left_out = tuple(executor.left_out())
            tracker.show("publishing")
            publication = publish(job)
        except KeyboardInterrupt:
            summary = _summary(job, tracker, None, where, time.monotonic() - started, exit_code=130)
            return replace(summary, notes=notes)
    tracker.show("done")
    exit_code = 1 if publication.counts["failed"] else 0
    latest = point_to_latest(spec.night) if spec.night is not None and exit_code == 0 else None
    summary = _summary(job, tracker, publication, where, time.monotonic() - started, exit_code=exit_code)
    return replace(summary, latest=latest, left_out=left_out, notes=notes)


def _adopt(
    spec: JobSpec, on_stage: Callable[[str], None], on_note: Callable[[str], None]
) -> tuple[Job, tuple[str, ...]]:
    """The job's output, checked to be writable and to belong to this very plan, and the notes on its manifest."""
    with draft_plan(spec, on_stage=on_stage) as draft:
        for note in draft.notes:
            on_note(note)
        on_stage("opening the output")
        storage = Storage.open(spec.out).probe(allow_single_writer=spec.runtime.single_writer)
        adopt(draft, storage)
        storage.mark_single_writer()  # after the plan: an output of another plan has been refused by now
    open_job.cache_clear()  # an earlier run in this process may have known another plan here
    return open_job(spec.out), draft.notes


def _open_executor(spec: JobSpec, plan: Plan, engine_factory: EngineFactory) -> Executor:
    if spec.runtime.executor == "inline":
        from latentmill.jobs.executors.inline import InlineExecutor

        return InlineExecutor(device=plan.settings.device, engine_factory=engine_factory)
    from latentmill.jobs.executors.ray import RayExecutor

    return RayExecutor(plan, spec.runtime, engine_factory=engine_factory)


def _execute(job: Job, out_url: str, executor: Executor, tracker: Tracker, interrupt: Interrupt) -> None:
    """Run passes over the open chunks until there is none. Raises KeyboardInterrupt if it was stopped before."""
    idle_passes = 0
    committed = job.ledger.committed()
    while not committed.all():
        tracker.begin_pass(committed, executor)
        pending: list[int] = np.flatnonzero(~committed).tolist()
        with closing(_receipts(executor, out_url, pending, repair=False)) as receipts:
            for receipt in receipts:
                tracker.add(receipt)
        before, committed = committed, job.ledger.committed()
        if interrupt.asked and not committed.all():
            raise KeyboardInterrupt
        idle_passes = idle_passes + 1 if committed.sum() == before.sum() else 0
        _give_up_after(idle_passes, len(pending), tracker)


def _repair(job: Job, out_url: str, executor: Executor, tracker: Tracker, interrupt: Interrupt) -> None:
    """Make the samples that failed once more: each of their chunks comes to an end once, whatever the outcome."""
    idle_passes = 0
    pending = set(job.ledger.failed_chunks())
    while pending:
        tracker.begin_repair(executor)
        before = len(pending)
        with closing(_receipts(executor, out_url, sorted(pending), repair=True)) as receipts:
            for receipt in receipts:
                tracker.add(receipt)
                if receipt.done:
                    pending.discard(receipt.chunk)
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


def _receipts(executor: Executor, out_url: str, chunks: list[int], *, repair: bool) -> Generator[Receipt]:
    """The executor's receipts, until one says that going on is useless: those in flight may still commit."""
    for receipt in executor.run(out_url, chunks, repair=repair):
        if receipt.blame == "conflict":
            raise OutputConflictError(receipt.error)
        if receipt.blame == "store":
            raise StorageError(receipt.error or "")
        yield receipt


def _summary(
    job: Job,
    tracker: Tracker,
    publication: Publication | None,
    where: str,
    seconds: float,
    *,
    exit_code: int,
) -> RunSummary:
    out = job.storage.url
    return RunSummary(
        exit_code=exit_code,
        out=out,
        executor=where,
        samples=job.plan.n_samples,
        rejected_rows=job.plan.n_rejected,
        counts=None if publication is None else publication.counts,
        generated=tracker.generated,
        seconds=seconds,
        images_per_second=tracker.generated / seconds if seconds > 0 else 0.0,
        next_command=RESUME if publication is None else f"latentmill report {shlex.quote(out)}",
        failures=() if publication is None else failed_rows(job, publication),
        execution_classes=() if publication is None else publication.execution_classes,
    )
