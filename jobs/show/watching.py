"""`status --watch` as it is seen: drawn anew on a terminal, a line for each look elsewhere, or a JSON object a line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from latentmill.jobs.outputs.pace import WORKERS_SECONDS
from latentmill.jobs.outputs.status import StatusReport
from latentmill.jobs.show.display import duration, json_line, safe
from latentmill.jobs.show.views import show_job_status
from latentmill.jobs.stages import Stage
from latentmill.jobs.submission.submission import JobStatus
from latentmill.jobs.submission.watch import watch_job
from latentmill.jobs.terminal import print_line

INTERRUPTED = 130


def watch(target: str, *, every: float, deep: bool, address: str | None, price: float | None, as_json: bool) -> int:
    """Show a job until it ends, or until Ctrl-C, which leaves it alone. The exit code of `status`; 130 after Ctrl-C."""
    with _view(as_json=as_json) as view:
        try:
            last = watch_job(target, view.look, every=every, deep=deep, address=address, on_trouble=view.trouble)
        except KeyboardInterrupt:
            view.trouble("no longer watched; the job goes on as it did")
            return INTERRUPTED
    if not as_json:
        show_job_status(last, price)
    return last.exit_code


class _View(Protocol):
    def look(self, status: JobStatus) -> None: ...
    def trouble(self, text: str) -> None: ...


@contextmanager
def _view(*, as_json: bool) -> Iterator[_View]:
    console = Console()
    if as_json:
        yield JsonLooks()
    elif not console.is_terminal:
        yield LineLooks()
    else:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield ScreenLooks(live)


class JsonLooks:
    """One JSON object for each look, on standard output."""

    def look(self, status: JobStatus) -> None:
        """What `status --json` says, with the time."""
        print_line(json_line({"time": utc(time.time()), **status.to_dict()}))

    def trouble(self, text: str) -> None:
        """On standard error."""
        print_line(f"latentmill: {safe(text)}", error=True)


class LineLooks:
    """One line for each look, on standard output."""

    def look(self, status: JobStatus) -> None:
        """All of it in one line."""
        parts = [_headline(status), *_details(status)]
        print_line(f"{utc(time.time())} {safe('; '.join(parts))}")

    def trouble(self, text: str) -> None:
        """On standard error."""
        print_line(f"latentmill: {safe(text)}", error=True)


class ScreenLooks:
    """The last look, drawn over the one before: a bar, and a line for each thing there is to say."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def look(self, status: JobStatus) -> None:
        """Draw this one."""
        self._live.update(_Screen(status), refresh=True)

    def trouble(self, text: str) -> None:
        """One line above."""
        self._live.console.print(Text(safe(text), style="yellow"))


class _Screen:
    def __init__(self, status: JobStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report = self._status.report
        if report is not None:
            yield Text(safe(report.out), style="bold", no_wrap=True, overflow="ellipsis")
            yield ProgressBar(total=report.samples, completed=report.samples_committed, width=options.max_width - 2)
            yield Segment.line()
        stalled = report is not None and report.pace is not None and report.pace.stalled
        yield Text(safe(_headline(self._status)), no_wrap=True, overflow="ellipsis")
        for line in _details(self._status):
            yield Text(f"  {safe(line)}", style="yellow" if stalled else "dim", no_wrap=True, overflow="ellipsis")


def _headline(status: JobStatus) -> str:
    """The state, how much is done, the rate and the time left."""
    report = status.report
    if report is None:
        return "not planned yet, or not to be seen from here"
    share = report.samples_committed / report.samples
    head = f"{report.state}: {report.samples_committed:,} of {report.samples:,} samples ({share:.0%})"
    pace = report.pace
    if pace is None or pace.last_commit is None or report.state == "complete":
        return head
    return f"{head}, {pace.images_per_second:.2f} img/s, ETA {duration(pace.eta_seconds)}"


def _details(status: JobStatus) -> list[str]:
    lines = [] if status.report is None else [*_details_of_output(status.report)]
    return lines if status.job is None else [*lines, f"job {status.job.job_id} is {status.job.state}"]


def _details_of_output(report: StatusReport) -> Iterator[str]:
    pace = report.pace
    if report.counts is not None:
        yield ", ".join(f"{count:,} {status}" for status, count in report.counts.items())
    if pace is None:
        return
    if report.state == "complete":
        yield "every chunk is committed; the dataset is not published yet"
    elif pace.last_commit is None or pace.silent_seconds is None:
        yield "no commit yet"
    elif pace.stalled:
        yield f"no commit for {duration(pace.silent_seconds)}; the last was at {utc(pace.last_commit)}"
    else:
        workers = f"{pace.workers} worker{'' if pace.workers == 1 else 's'} in the last {WORKERS_SECONDS / 60:.0f} min"
        yield f"last commit {duration(pace.silent_seconds)} ago, {workers}"
    if pace.stage_seconds:
        yield stage_text(pace.stage_seconds)


def stage_text(stage_seconds: Mapping[Stage, float]) -> str:
    """A worker's seconds for a picture, the slowest stage first."""
    (slowest, longest), *others = stage_seconds.items()
    return ", ".join(
        [
            f"a picture takes {slowest} {longest:.3g} s (the slowest stage)",
            *(f"{stage} {seconds:.3g} s" for stage, seconds in others),
        ]
    )


def utc(seconds: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
