"""What a person sees: untrusted text made harmless, progress while a job runs, tables and summaries afterwards."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBar
from rich.table import Table
from rich.text import Text

from latentmill.jobs.show.ticker import Ticker
from latentmill.jobs.terminal import print_line

if TYPE_CHECKING:
    from latentmill.jobs.outputs.verify import VerifyProgress
    from latentmill.jobs.progress import Progress  # they import pyarrow; `--help` must not wait for it


PLAIN_EVERY = 10.0
"""Seconds between two progress lines without a terminal."""

_LEAST_SHOWN = 0.01
"""Stages that are less busy are not named, but for the slowest one."""

_HIDDEN = frozenset(["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])
"""Unicode categories that control a terminal, change the order of text, or are invisible."""


def safe(text: object, limit: int | None = None) -> str:
    """One harmless line for a terminal: control, bidirectional and invisible characters are escaped.

    A text of more than `limit` characters ends in an ellipsis.
    """
    shown = "".join(map(_spelled, str(text) if limit is None else str(text)[: limit + 1]))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def _spelled(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    if character in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def print_json(value: Any) -> None:
    """Print JSON; everything but ASCII is escaped, so no value can control a terminal."""
    sys.stdout.write(_harmless_json(value, indent=2) + "\n")


def json_line(value: Any) -> str:
    """The same as one line."""
    return _harmless_json(value, indent=None)


def _harmless_json(value: Any, *, indent: int | None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=True, default=str).replace("\x7f", "\\u007f")


def print_untrusted(text: str) -> None:
    """Print untrusted lines, with control characters escaped."""
    for line in text.splitlines():
        print_line(safe(line.expandtabs()))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; every cell is treated as untrusted."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    Console().print(table)


def print_facts(title: str, facts: Mapping[str, object], *, style: str = "green") -> None:
    """Print names and values: in a frame on a terminal, else one `name: value` per line. Values are untrusted."""
    console = Console()
    if not console.is_terminal:
        print_line(safe(title))
        for name, value in facts.items():
            print_line(f"  {name}: {safe(value)}")
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(safe(name)), Text(safe(value)))
    console.print(Panel(grid, title=Text(safe(title)), title_align="left", border_style=style, expand=False))


def print_summary(title: str, facts: Mapping[str, object], *, style: str = "green") -> None:
    """The same without a frame anywhere, to be pasted into a chat or an issue."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text(safe(title), style=f"bold {style}"))
    for name, value in facts.items():
        console.print(Text.assemble("  ", (f"{name}:", "bold"), f" {safe(value)}"))


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:05`, or a dash if unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Step(Protocol):
    """One state of progress: `done` of `total` in a phase."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


class ProgressView(Protocol):
    """A context manager that shows progress."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, progress: Step) -> None: ...
    def stage(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


def progress_detail(progress: Progress) -> str:
    """Rate, time left by now, flagged, failed, actors of a run, and how busy its stages are, the slowest one first.

    A narrow terminal cuts it at the end, where the least matters.
    """
    busy = ", ".join(
        f"{stage} {speed.busy:.0%}"
        for number, (stage, speed) in enumerate(progress.stages.items())
        if number == 0 or speed.busy >= _LEAST_SHOWN
    )
    return (
        f"{progress.images_per_second:.2f} img/s, ETA {duration(progress.eta_at(time.monotonic()))}, "
        f"{progress.flagged} flagged, {progress.failed} failed, {progress.actors} actors{busy and '; busy: '}{busy}"
    )


def verify_detail(progress: VerifyProgress) -> str:
    """What `verify` has read, and the defects found."""
    return f"{progress.images:,} images, {size(progress.bytes)} read, {progress.defects:,} defects"


@contextmanager
def progress_view(
    first: str = "planning", detail: Callable[[Any], str] = progress_detail, *, quiet: bool = False
) -> Iterator[ProgressView]:
    """A live bar if standard error is a terminal, plain lines if not; `first` is the phase before the first step.

    It writes to a separate descriptor, which works while the executor captures what libraries write. With `quiet`, it
    shows notes only.
    """
    with os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") as stream:
        view: ProgressView
        if quiet:
            view = QuietView(stream)
        elif stream.isatty():
            view = BarView(Console(file=stream), first, detail)
        else:
            view = LineView(stream, first, detail)
        with view:
            yield view


class _BarWithDetail(RichBar):
    detail: Callable[[], str] = staticmethod(lambda: "")

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then the detail as it is now."""
        yield self.make_tasks_table(self.tasks)
        yield Text(f"  {self.detail()}", style="dim", no_wrap=True, overflow="ellipsis")


class BarView:
    """A moving bar with the detail below: two lines fit any terminal."""

    def __init__(
        self, console: Console, first: str = "planning", detail: Callable[[Any], str] = progress_detail
    ) -> None:
        self._detail = detail
        self._phase, self._stage = first, ""
        self._bar = _BarWithDetail(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(first, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, progress: Step) -> None:
        """Draw this state."""
        if progress.phase != self._phase:
            self._phase, self._stage = progress.phase, ""
        self._bar.detail = partial(self._detail, progress)
        self._bar.update(self._task, description=self._label(), completed=progress.done, total=progress.total)

    def stage(self, text: str) -> None:
        """Say what this phase waits for, until the next phase."""
        self._stage = text
        self._bar.update(self._task, description=self._label())

    def _label(self) -> str:
        return safe(f"{self._phase}: {self._stage}" if self._stage else self._phase)

    def note(self, text: str) -> None:
        """One line above the bar."""
        self._bar.console.print(Text(safe(text)))


class QuietView:
    """No progress at all; only notes are shown."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, progress: Step) -> None:
        """Nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """One line now."""
        self._stream.write(f"latentmill: {safe(text)}\n")


class LineView:
    """One line at the start, one when the phase changes, and one every ten seconds."""

    def __init__(
        self,
        stream: TextIO,
        first: str = "planning",
        detail: Callable[[Any], str] = progress_detail,
        every: float = PLAIN_EVERY,
    ) -> None:
        self._stream = stream
        self._first = first
        self._detail = detail
        self._latest: Step | None = None
        self._stage = ""
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._ticker = Ticker(self._show, every)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._show()
        self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.__exit__(kind, error, trace)

    def update(self, progress: Step) -> None:
        """Remember this state; show it now only if the phase is new."""
        with self._lock:
            before = self._first if self._latest is None else self._latest.phase
            changed, self._latest = before != progress.phase, progress
            self._stage = "" if changed else self._stage
        if changed:
            self._show()

    def stage(self, text: str) -> None:
        """Say in the next lines what this phase waits for, until the next phase."""
        with self._lock:
            self._stage = text

    def note(self, text: str) -> None:
        """One line now."""
        self._stream.write(f"latentmill: {safe(text)}\n")
        self._stream.flush()

    def _show(self) -> None:
        with self._lock:
            progress, stage = self._latest, f" ({self._stage})" if self._stage else ""
        elapsed = duration(time.monotonic() - self._started)
        if progress is None:
            self.note(f"{self._first}{stage} [{elapsed}]")
        else:
            self.note(f"{progress.phase}{stage} {progress.done}/{progress.total} [{elapsed}] {self._detail(progress)}")
