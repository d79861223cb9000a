"""Processes of a command, seen from outside: who they are, what processor time they took, and how to end them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.machine import ROOT

_TICKS = os.sysconf("SC_CLK_TCK")
_SETTLE_LOOKS = 25
_SERVICES = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment. `started` is in ticks since boot: with the pid it names a process for ever."""

    pid: int
    parent: int
    started: int
    cpu_seconds: float
    title: str

    @property
    def is_worker(self) -> bool:
        """A process with work of the job in it: Ray names those after their work, and its own services too."""
        return self.title.startswith("ray::") and not self.title.startswith(_SERVICES)


def read_process(pid: int) -> Process | None:
    """A process as /proc shows it, or None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":
        return None
    return Process(pid, int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / _TICKS, title)


def descendants(root: int) -> list[Process]:
    """All processes below `root` at this moment."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        found = read_process(int(entry.name)) if entry.name.isdigit() else None
        if found is not None:
            children.setdefault(found.parent, []).append(found)
    below, left = [], [root]
    while left:
        for child in children.get(left.pop(), []):
            below.append(child)
            left.append(child.pid)
    return below


@dataclass(kw_only=True, slots=True)
class CommandRun:
    """A command that has ended. `processes` is every process that was seen, as it was last seen."""

    exit_code: int
    seconds: float
    output: str
    ended: float = 0.0
    """When it ended, in seconds since the epoch; what it left behind is waited for after that."""
    processes: dict[tuple[int, int], Process] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    """Seconds until each of the awaited things was there."""
    driver_peak_mib: float = 0.0
    outlived: int = 0
    """Processes that were still there some seconds after the command had ended."""

    @property
    def cpu_seconds(self) -> float:
        return sum(process.cpu_seconds for process in self.processes.values())


def run_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    awaited: Mapping[str, Callable[[], bool]] | None = None,
    meanwhile: Callable[[int, dict[tuple[int, int], Process]], None] | None = None,
    period: float = 0.25,
    timeout: float = 1200,
    check: bool = True,
) -> CommandRun:
    """Run a command in a session of its own and watch it until it ends; no process of it is left afterwards.

    `awaited` says what to look for, `meanwhile` is called with the pid and the processes at every look.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    chunks: list[str] = []
    reader = threading.Thread(target=_read_all, args=(process, chunks), daemon=True)
    reader.start()
    run = CommandRun(exit_code=0, seconds=0.0, output="")
    try:
        while process.poll() is None:
            if time.perf_counter() - started > timeout:
                raise TimeoutError(f"{' '.join(command[:4])} ... took more than {timeout:.0f} s")
            _look(process.pid, run, awaited or {}, started)
            if meanwhile is not None:
                meanwhile(process.pid, run.processes)
            time.sleep(period)
        run.seconds, run.ended = time.perf_counter() - started, time.time()
        for name, there in (awaited or {}).items():
            if name not in run.first and there():
                run.first[name] = run.seconds
        run.outlived = _settle(run)
    finally:
        end([*run.processes.values()])
    reader.join(10)
    run.exit_code, run.output = process.returncode, "".join(chunks)
    if check and run.exit_code:
        raise RuntimeError(f"{' '.join(command[:6])} ended with {run.exit_code}: {run.output[-3000:]}")
    return run


def _read_all(process: subprocess.Popen[str], chunks: list[str]) -> None:
    assert process.stdout is not None
    with process.stdout as output:
        chunks.extend(output)


def _settle(run: CommandRun) -> int:
    """Processes that are left after a while in which those that end with their parent have done so."""
    for _ in range(_SETTLE_LOOKS):
        left = [each for each in run.processes.values() if _is_there(each)]
        if not left:
            return 0
        time.sleep(0.2)
    return len(left)


def _is_there(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started


def _look(pid: int, run: CommandRun, awaited: Mapping[str, Callable[[], bool]], started: float) -> None:
    own = read_process(pid)
    for found in [*([own] if own else []), *descendants(pid)]:
        run.processes[found.pid, found.started] = found
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                run.driver_peak_mib = max(run.driver_peak_mib, int(line.split()[1]) / 1024)
    except OSError:
        pass  # it has just ended
    for name, there in awaited.items():
        if name not in run.first and there():
            run.first[name] = time.perf_counter() - started


def end(processes: Sequence[Process]) -> list[Process]:
    """Kill what is left of these processes, which are ours; returns those that were still there."""
    left = []
    for process in processes:
        if _is_there(process):
            left.append(process)
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    return left
