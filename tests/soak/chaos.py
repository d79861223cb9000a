"""The storm: what is killed, stopped, interrupted or cleaned next, and when, follows from a seed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.cluster import Cluster
from tests.harness.processes import Family, Process, kill_tree, send
from tests.soak.drivers import Driver
from tests.soak.supervisor import working


@dataclass(frozen=True, kw_only=True)
class Climate:
    """Mean seconds between two events of each kind; workers: between a second and ten."""

    driver: float = 55.0
    interrupt: float = 100.0
    node: float = 80.0
    head: float = 300.0
    clean: float = 40.0
    longest_stop: float = 40.0


@dataclass
class Storm:
    """Disturbs one history. `tick` is called all the time; `calm` ends it, and wakes everything that was stopped."""

    cluster: Cluster
    family: Family
    drivers: Sequence[Driver]
    out: str
    folder: Path
    climate: Climate
    chooser: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    cleanings: Counter[int] = field(default_factory=Counter)
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._stopped: list[tuple[float, int]] = []
        self._later: list[tuple[float, Driver, int]] = []
        self._cleaners: list[subprocess.Popen[bytes]] = []
        self._acts: dict[str, Callable[[], bool]] = {
            "worker": self._worker,
            "driver": self._driver,
            "interrupt": self._interrupt,
            "node": self._node,
            "head": self._head,
            "clean": self._clean,
        }
        self._next = {kind: self._begin + self._pause(kind) for kind in self._acts}

    def tick(self) -> None:
        """Do what is due. What finds no victim is tried again soon."""
        now = time.monotonic()
        self._wake(now)
        for kind, due in list(self._next.items()):
            if now >= due:
                self._next[kind] = now + (self._pause(kind) if self._acts[kind]() else 0.3)

    def calm(self) -> None:
        """Nothing more is disturbed, and nothing stays stopped."""
        self._wake(float("inf"))

    def _pause(self, kind: str) -> float:
        if kind == "worker":
            return 1.0 + 9.0 * float(self.chooser.random() ** 1.5)  # one to ten, rather less than more
        mean: float = getattr(self.climate, kind)
        return mean * self.chooser.uniform(0.5, 1.5)

    def _worker(self) -> bool:
        everyone = sorted(working(), key=lambda process: process.pid)
        main = [process for process in everyone if _kind(process) in {"actor"}]
        if not main:
            return False
        victim = self.chooser.choice(main if self.chooser.random() < 0.9 else everyone)
        kind = _kind(victim)
        return self._stop(kind, victim.pid) if self.chooser.random() < 0.12 else self._kill(kind, victim.pid)

    def _driver(self) -> bool:
        running = [driver.process.pid for driver in self.drivers if driver.process is not None]
        if not running:
            return False
        victim = self.chooser.choice(running)
        return self._stop("driver", victim) if self.chooser.random() < 0.2 else self._kill("driver", victim)

    def _interrupt(self) -> bool:
        driver = self.chooser.choice(self.drivers)
        number = self.chooser.choice([signal.SIGINT, signal.SIGTERM])
        if not driver.send(number):
            return False
        twice = self.chooser.random() < 0.3
        if twice:
            self._later.append((time.monotonic() + 1.0, driver, number))
        self._note(f"{number.name}{' twice' if twice else ''} to a driver")
        self.stops["interrupted driver"] += 1
        return True

    def _node(self) -> bool:
        node = self.chooser.choice(self.cluster.workers)
        raylet, way = node.raylet, self.chooser.random()
        if raylet is None or node.process is None or time.monotonic() - node.started < 5.0:
            return False
        if way < 0.2:
            return self._stop("raylet", raylet.pid)
        if way < 0.6:
            return self._kill("raylet", raylet.pid)
        kill_tree(node.process.pid)
        self.kills["whole node"] += 1
        self._note(f"killed {node.name} and all on it")
        return True

    def _head(self) -> bool:
        head = self.cluster.head
        gcs = head.gcs
        if gcs is None or head.process is None or time.monotonic() - head.started < 20.0:
            return False
        if self.chooser.random() < 0.5:
            return self._kill("head", gcs.pid)
        kill_tree(head.process.pid)
        self.kills["head"] += 1
        self._note("killed the head and all on it")
        return True

    def _clean(self) -> bool:
        self._collect_cleaners()
        command = [sys.executable, "-m", "latentmill", "clean", self.out]
        command += ["--dry-run"] if self.chooser.random() < 0.3 else []
        log = self.folder / "clean.log"
        self._cleaners.append(self.family.start(command, self.cluster.environment, log, cwd=self.folder))
        return True

    def _collect_cleaners(self) -> None:
        ended = [cleaner for cleaner in self._cleaners if cleaner.poll() is not None]
        self.cleanings.update(cleaner.returncode for cleaner in ended)
        self._cleaners = [cleaner for cleaner in self._cleaners if cleaner not in ended]

    def end(self) -> None:
        """Wait for the cleaners that are still at it."""
        for cleaner in self._cleaners:
            cleaner.wait(120)
        self._collect_cleaners()

    def _kill(self, kind: str, pid: int) -> bool:
        if not send(pid, signal.SIGKILL):
            return False
        self.kills[kind] += 1
        self._note(f"killed {kind} {pid}")
        return True

    def _stop(self, kind: str, pid: int) -> bool:
        """A zombie: it is thought dead, and comes back with what it held."""
        seconds = self.chooser.uniform(2.0, self.climate.longest_stop)
        if not send(pid, signal.SIGSTOP):
            return False
        self._stopped.append((time.monotonic() + seconds, pid))
        self.stops[f"stopped {kind}"] += 1
        self._note(f"stopped {kind} {pid} for {seconds:.0f} s")
        return True

    def _wake(self, now: float) -> None:
        for until, pid in [entry for entry in self._stopped if entry[0] <= now]:
            send(pid, signal.SIGCONT)
            self._stopped.remove((until, pid))
        for due, driver, number in [entry for entry in self._later if entry[0] <= now]:
            driver.send(number)
            self._later.remove((due, driver, number))

    def _note(self, event: str) -> None:
        self.events.append(f"{time.monotonic() - self._begin:7.1f} s  {event}")


def _kind(process: Process) -> str:
    return "actor" if "WorkerProcess" in process.title else "other worker"
