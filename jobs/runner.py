"""Run a job until nothing is left: plan, adopt, execute what the ledger lacks, publish."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jobs.errors import JobError, OutputConflictError
from jobs.executors.base import Executor
from jobs.job import Job, open_job
from jobs.outputs.failures import FailedRow, failed_rows
from jobs.outputs.latest import Latest, point_to_latest
from jobs.outputs.publish import Publication, publish, standing_publication
from jobs.plans.plan import Plan, adopt, draft_plan
from jobs.spec import JobSpec
from jobs.store.errors import StorageError
from jobs.store.storage import Storage
from jobs.worker import EngineFactory, Receipt, load_engine

PASSES_WITHOUT_PROGRESS = 3
"""Passes over the open chunks that may end without one new commit before the job gives up."""

RESUME = "run the same command again: it resumes"

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
    execution_classes: tuple[str, ...] = ()
    latest: Latest | None = None


def run_job(
    spec: JobSpec,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_stop: Callable[[], None] = lambda: None,
    engine_factory: EngineFactory = load_engine,
) -> RunSummary:
    """Afterwards the dataset is published (exit code 0, or 1 with failed samples), or the job can be resumed (130).

    The first SIGINT or SIGTERM calls `on_stop` and lets the chunks in flight finish, the second stops at once. Raises
    UsageError or OutputConflictError before anything is written or any model is loaded, JobError when open chunks keep
    failing. With `spec.runtime.retry_failed`, samples that failed are made once more.
    """
    started = time.monotonic()
    with _graceful_interrupt(on_stop) as interrupt:
        job = _adopt(spec)
        tracker = _Tracker(job.plan, on_progress)
        publication = standing_publication(job)
        where = "nothing to do"
        try:
            if publication is None or (spec.runtime.retry_failed and publication.counts["failed"]):
                executor = _open_executor(spec, job.plan, engine_factory)
                where = executor.describe()
                with closing(executor), interrupt.stopping(executor):
                    _execute(job, spec.out, executor, tracker, interrupt)
                    if spec.runtime.retry_failed:
                        _repair(job, spec.out, executor, tracker, interrupt)
            tracker.show("publishing")
            publication = publish(job)
        except KeyboardInterrupt:
            return _summary(job, tracker, None, where, time.monotonic() - started, exit_code=130)
    tracker.show("done")
    exit_code = 1 if publication.counts["failed"] else 0
    latest = point_to_latest(spec.night) if spec.night is not None and exit_code == 0 else None
    return _summary(job, tracker, publication, where, time.monotonic() - started, exit_code=exit_code, latest=latest)


def _adopt(spec: JobSpec) -> Job:
    """The job's output, checked to be writable and to belong to this very plan."""
    with draft_plan(spec) as draft:
        storage = Storage.open(spec.out).probe(allow_single_writer=spec.runtime.single_writer)
        adopt(draft, storage)
        storage.mark_single_writer()  # after the plan: an output of another plan has been refused by now
    open_job.cache_clear()  # an earlier run in this process may have known another plan here
    return open_job(spec.out)


def _open_executor(spec: JobSpec, plan: Plan, engine_factory: EngineFactory) -> Executor:
    if spec.runtime.executor == "inline":
        from jobs.executors.inline import InlineExecutor

        return InlineExecutor(device=plan.device, engine_factory=engine_factory)
    from jobs.executors.ray import RayExecutor

    return RayExecutor(plan, spec.runtime, engine_factory=engine_factory)


def _execute(job: Job, out_url: str, executor: Executor, tracker: _Tracker, interrupt: _Interrupt) -> None:
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


def _repair(job: Job, out_url: str, executor: Executor, tracker: _Tracker, interrupt: _Interrupt) -> None:
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


def _give_up_after(idle_passes: int, n_pending: int, tracker: _Tracker) -> None:
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


class _Interrupt:
    """What SIGINT and SIGTERM do: the first stops an executor that has work in flight, any other one everything."""

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self.asked = False
        self._on_stop = on_stop
        self._executor: Executor | None = None

    def handle(self, _signal: int, _frame: Any) -> None:
        """The signals' handler."""
        first, self.asked = not self.asked, True
        if not first or self._executor is None or not self._executor.stop():
            raise KeyboardInterrupt
        self._on_stop()

    @contextmanager
    def stopping(self, executor: Executor) -> Iterator[None]:
        """Within, the first signal lets this executor finish what is in flight."""
        self._executor = executor
        try:
            yield
        finally:
            self._executor = None


@contextmanager
def _graceful_interrupt(on_stop: Callable[[], None]) -> Iterator[_Interrupt]:
    """Within, SIGINT and SIGTERM are handled. Only a main thread can do that; elsewhere its owner decides."""
    interrupt = _Interrupt(on_stop)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = {number: signal.signal(number, interrupt.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Tracker:
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


def _summary(
    job: Job,
    tracker: _Tracker,
    publication: Publication | None,
    where: str,
    seconds: float,
    *,
    exit_code: int,
    latest: Latest | None = None,
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
        latest=latest,
    )
