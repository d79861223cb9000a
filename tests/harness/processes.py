"""Processes of this machine as /proc shows them, and a family of them of which none stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    """A live process as /proc shows it."""

    pid: int
    parent: int
    state: str
    title: str


def start_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, cwd: Path, answer: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own. Its words go to `log`, its standard output to `answer` if given."""
    with log.open("ab") as words, (answer or log).open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=words, cwd=cwd, env={**os.environ, **environment}, start_new_session=True
        )


def below(pid: int | None = None) -> list[Process]:
    """All descendants of a process (of this one), zombies left out."""
    children: dict[int, list[Process]] = {}
    for process in _all_processes():
        children.setdefault(process.parent, []).append(process)
    found, open_ = [], [pid or os.getpid()]
    while open_:
        for child in children.get(open_.pop(), []):
            found.append(child)
            open_.append(child.pid)
    return [process for process in found if process.state != "Z"]


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it at once, as a machine that loses its power."""
    pids = [pid, *(process.pid for process in below(pid))]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none can react to another's death
        for each in pids:
            send(each, number)


def send(pid: int, number: int) -> bool:
    """Whether there was such a process to receive the signal."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Family:
    """The processes below this one, whoever started them. Orphans come to us instead of to init: nothing escapes."""

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._children: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        cwd: Path,
        answer: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """`start_process`, remembered."""
        child = start_process(command, environment, log, cwd=cwd, answer=answer)
        self._children.append(child)
        return child

    def reap(self) -> None:
        """Let orphans that ended go; the children started here are left to those who wait for them."""
        own = {child.pid for child in self._children}
        for process in _all_processes():
            if process.state == "Z" and process.parent == os.getpid() and process.pid not in own:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def end(self) -> int:
        """Afterwards nothing is left below this process. Returns how many processes would not go, which is 0."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (left := below()):
            for process in left:
                send(process.pid, signal.SIGKILL)
            time.sleep(0.1)
            for child in self._children:
                child.poll()
            self.reap()
        return len(below())


def _all_processes() -> list[Process]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            found.append(Process(int(folder.name), int(parent), state, title.strip()))
    return found
