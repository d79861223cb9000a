"""The same kills on Ray Data's checkpointed job and on ours: what is lost, doubled, orphaned, and made again."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from bench.figures import figure
from bench.pictures import rows_of, write_prompts
from bench.processes import Process, read_process, run_command
from bench.table import Context, Measured
from bench.tracing import pictures_made, read_trace
from bench.whole_jobs import Work, our_command, peer_command

Victim = Literal["worker", "driver"]

ATTEMPTS = 5
"""Runs of one command after which a job that does not end is given up."""

HUNG_SECONDS = 180.0
"""A run that takes so long is ended: undisturbed ones take half a minute."""

SCHEDULES: dict[str, Sequence[tuple[float, Victim]]] = {
    "workers": ((0.25, "worker"), (0.6, "worker")),
    "drivers": ((0.25, "driver"), (0.6, "driver")),
}


_UNITS = {
    "lost": "rows",
    "doubled": "rows",
    "orphaned": "files",
    "missing_files": "files",
    "made_again": "rows",
    "hung": "runs",
    "outlived": "processes",
    "seconds": "s",
}


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What a job left behind after the kills, once the command had ended by itself."""

    kills: list[str] = field(default_factory=list)
    runs: int = 0
    finished: bool = False
    lost: int = 0
    doubled: int = 0
    orphaned: int = 0
    missing_files: int = 0
    made_again: int = 0
    outlived: int = 0
    """Processes that were still there when their driver was not."""
    hung: int = 0
    """Runs that did not come to an end."""
    seconds: float = 0.0


@dataclass(kw_only=True, slots=True)
class Killer:
    """Kills when so much of the pictures is there, once each."""

    out: Path
    pictures: int
    left: list[tuple[float, Victim]]
    kills: list[str] = field(default_factory=list)

    def look(self, pid: int, seen: dict[tuple[int, int], Process]) -> None:
        """Called at every look at the command."""
        done = sum(1 for _ in (self.out / "images").rglob("*.png")) / self.pictures
        if not self.left or done < self.left[0][0]:
            return
        victim = self.left[0][1]
        target = pid if victim == "driver" else _busiest_worker(pid, seen)
        if target is None:
            return
        self.left.pop(0)
        self.kills.append(f"{victim} at {done:.0%}")
        os.kill(target, signal.SIGKILL)


def _busiest_worker(driver: int, seen: dict[tuple[int, int], Process]) -> int | None:
    """The process that has worked most: one with a model in it."""
    alive = [each for each in seen.values() if each.pid != driver and each.is_worker]
    for process in sorted(alive, key=lambda each: each.cpu_seconds, reverse=True):
        now = read_process(process.pid)
        if now is not None and now.started == process.started:
            return process.pid
    return None


def compare(context: Context) -> Measured:
    """Both jobs under each schedule of kills."""
    pictures, steps = (24, 4) if context.tiny else (96, 10)
    work = Work(manifest=write_prompts(context.folder / "prompts.parquet", pictures), steps=steps, side=256)
    measured = Measured(notes=[f"{pictures} pictures; SIGKILL of the worker that has worked most, or of the driver"])
    for name, schedule in SCHEDULES.items():
        for who, command in (("ours", _ours), ("ray-data-checkpoint", _peer)):
            outcome = _suffer(
                context.folder / f"{who}-{name}",
                work,
                pictures,
                list(schedule[: 1 if context.tiny else None]),
                command,
                who,
            )
            measured.details[f"{who}, {name}"] = asdict(outcome)
            measured.notes.append(
                f"{who}, {name} killed: {', '.join(outcome.kills) or 'none'}; "
                f"{'finished' if outcome.finished else 'never finished'} after {outcome.runs} run(s)"
            )
            for what, unit in _UNITS.items():
                name_of_figure = f"{name} killed, {what.replace('_', ' ')}: {who}"
                measured.figures.append(figure(name_of_figure, unit, [getattr(outcome, what)]))
    return measured


def _ours(work: Work, out: Path) -> list[str]:
    command = our_command(work, str(out))
    return [sys.executable, "-m", "bench.own_engines", "traced_engine", *command[command.index("run") :]]


def _peer(work: Work, out: Path) -> list[str]:
    return peer_command("ray-data-checkpoint", work, str(out))


def _suffer(
    out: Path,
    work: Work,
    pictures: int,
    schedule: list[tuple[float, Victim]],
    command: Callable[[Work, Path], list[str]],
    who: str,
) -> Outcome:
    """Run the command, with kills, until it ends by itself."""
    killer, outcome = Killer(out=out, pictures=pictures, left=schedule), Outcome()
    trace = out.with_suffix(".trace")
    while outcome.runs < ATTEMPTS and not outcome.finished:
        outcome.runs += 1
        environment = {"BENCH_TRACE": str(trace)}
        try:
            run = run_command(
                command(work, out), environment=environment, meanwhile=killer.look, check=False, timeout=HUNG_SECONDS
            )
        except TimeoutError:
            outcome.hung += 1
            outcome.seconds += HUNG_SECONDS
            continue
        outcome.seconds += run.seconds
        outcome.finished = run.exit_code == 0
        outcome.outlived += run.outlived
    outcome.kills = killer.kills
    _account(outcome, out, pictures, "row_id" if who == "ours" else "id")
    outcome.made_again = pictures_made(read_trace(trace)) - pictures
    return outcome


def _account(outcome: Outcome, out: Path, pictures: int, key: str) -> None:
    rows = rows_of(out, [key, "image"]) if (out / "dataset").is_dir() else []
    counts = Counter(row[key] for row in rows)
    named = {row["image"] for row in rows if row["image"] is not None}
    there = {path.relative_to(out).as_posix() for path in (out / "images").rglob("*.png")}
    outcome.lost = pictures - len(counts)
    outcome.doubled = sum(counts.values()) - len(counts)
    outcome.orphaned, outcome.missing_files = len(there - named), len(named - there)
