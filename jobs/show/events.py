"""`--log-json`: what a run does as events, one JSON object a line, in the place of a bar or plain lines.

`EVENTS` is a promise: names stay, and an event has exactly these keys, besides `time` and `event`. More may be added.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from latentmill.jobs.show.display import PLAIN_EVERY, Step, json_line
from latentmill.jobs.show.ticker import Ticker

if TYPE_CHECKING:
    from latentmill.jobs.plans.plan import Plan
    from latentmill.jobs.progress import Progress
    from latentmill.jobs.runner import RunSummary

EVENTS: Mapping[str, Mapping[str, str]] = {
    "started": {
        "version": "of latentmill",
        "arguments": "of the command, from the verb on",
        "host": "the driver's machine",
        "pid": "its process",
    },
    "plan": {
        "out": "the output",
        "plan_hash": "what a resumed job must have in common with it",
        "model": "source of the model, of the first one if there are several",
        "rows": "of the manifest, without the rejected ones",
        "rejected_rows": "of the manifest",
        "samples": "pictures in all",
        "chunks": "in all",
        "chunks_committed": "that were committed before",
        "chunk_size": "samples of a chunk",
        "batch_size": "samples of a forward pass",
    },
    "phase": {
        "phase": "`planning`, `starting`, `generating`, `publishing` or `done`",
        "done": "samples in the ledger",
        "total": "samples that this run is to see there",
    },
    "stage": {"text": "what the phase waits for"},
    "progress": {
        "phase": "as above",
        "elapsed_seconds": "since the command began",
        "done": "as above",
        "total": "as above",
        "ok": "samples of this run",
        "flagged": "samples of this run",
        "failed": "samples of this run",
        "chunks_done": "chunks in the ledger",
        "chunks_total": "chunks that this run is to see there",
        "actors": "models at work",
        "images_per_second": "lately, of all workers together",
        "eta_seconds": "until the last chunk is committed; null before it can be told",
        "stages": "by name, the slowest first: `busy`, its share of its threads' time, and `images_per_second`, which "
        "it could do alone",
    },
    "note": {"text": "what should be known, as of the manifest"},
    "stopping": {"text": "the first Ctrl-C or SIGTERM was heard: chunks in flight finish"},
    "error": {"error": "what ended the command, with the remedy", "exit_code": "of the command"},
    "finished": {"exit_code": "of the command", "summary": "what `run --json` answers"},
}


class EventLog:
    """A view of a run's progress whose reader is a program: an event at once, and `progress` every ten seconds."""

    def __init__(self, handle: int, every: float = PLAIN_EVERY) -> None:
        self._handle = handle
        self._phase = "planning"
        self._latest: Progress | None = None
        self._started = time.monotonic()
        self._lock = threading.RLock()  # a signal's handler tells something too
        self._ticker = Ticker(self._tell_progress, every)

    def __enter__(self) -> Self:
        from latentmill.jobs.ledger.records import tool_versions

        self._tell(
            "started",
            version=tool_versions()["latentmill"],
            arguments=sys.argv[1:],
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.__exit__(kind, error, trace)

    def update(self, progress: Step) -> None:
        """Remember this state; a new phase is an event."""
        with self._lock:
            changed, self._phase = progress.phase != self._phase or self._latest is None, progress.phase
            self._latest = progress  # type: ignore[assignment]  # a run has no other steps
        if changed:
            self._tell("phase", phase=progress.phase, done=progress.done, total=progress.total)

    def stage(self, text: str) -> None:
        """What the phase waits for."""
        self._tell("stage", text=text)

    def note(self, text: str) -> None:
        """Something to be known."""
        self._tell("note", text=text)

    def stopping(self, text: str) -> None:
        """The run was asked to stop."""
        self._tell("stopping", text=text)

    def plan(self, plan: Plan, chunks_committed: int) -> None:
        """The plan that the output has now."""
        self._tell(
            "plan",
            out=plan.settings.out,
            plan_hash=plan.plan_hash,
            model=plan.model.source,
            rows=plan.n_rows,
            rejected_rows=plan.n_rejected,
            samples=plan.n_samples,
            chunks=plan.n_chunks,
            chunks_committed=chunks_committed,
            chunk_size=plan.settings.chunk_size,
            batch_size=plan.batch_size,
        )

    def finished(self, summary: RunSummary) -> None:
        """How the run ended; before that, how far it was."""
        self._tell_progress()
        self._tell("finished", exit_code=summary.exit_code, summary=asdict(summary))

    def _tell_progress(self) -> None:
        with self._lock:
            progress = self._latest
        if progress is None:
            return
        now = time.monotonic()
        fields = {name: value for name, value in asdict(progress).items() if name != "made_at"}
        fields |= {"eta_seconds": progress.eta_at(now), "elapsed_seconds": now - self._started}
        self._tell("progress", **fields)

    def _tell(self, event: str, **fields: Any) -> None:
        line = memoryview(_line(event, fields).encode())
        with self._lock:
            while line:
                line = line[os.write(self._handle, line) :]


_begun = threading.Event()
"""Whether this process tells events."""


@contextmanager
def event_log() -> Iterator[EventLog]:
    """Events on standard error, also while an executor captures what libraries write there."""
    _begun.set()
    handle = os.dup(2)
    try:
        with EventLog(handle) as log:
            yield log
    finally:
        os.close(handle)


def tell_error(text: str, exit_code: int) -> bool:
    """Tell what ends the command as an event, if it tells events; whether it does."""
    if not _begun.is_set() and "--log-json" not in sys.argv[2:]:
        return False
    sys.stderr.write(_line("error", {"error": text, "exit_code": exit_code}))
    sys.stderr.flush()
    return True


def _line(event: str, fields: Mapping[str, Any]) -> str:
    moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json_line({"time": moment, "event": event, **fields}) + "\n"
