"""A Ray cluster of real nodes on this machine, each with a supervisor's patience: what dies is started again."""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.processes import Family, Process

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
_RAYS_OWN = re.compile("IDLE|Agent|_StatsActor|_AutoscalingCoordinator|ActorLocationTracker")
_STORE_BYTES = 128_000_000
_LONGEST_START = 15.0
"""Two raylets that start at once on one machine choose the same socket and one dies: each waits for the one before."""


@dataclass
class Node:
    """One raylet with all that belongs to it; `process` is its `ray start --block`."""

    name: str
    cpus: int
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    started: float = 0.0


@dataclass
class Cluster:
    """A head and some workers, guarded by a token. `supervise` has to be called all the time."""

    family: Family
    folder: Path
    """Short, for Ray puts sockets far below it."""
    store: dict[str, str]
    """The variables by which its workers find the object store."""
    worker_cpus: tuple[int, ...] = (3, 3, 3)
    port: int = field(init=False)
    environment: dict[str, str] = field(init=False)
    head: Node = field(init=False)
    workers: list[Node] = field(init=False)
    restarts: int = 0

    def __post_init__(self) -> None:
        self.port = _lasting_port()
        self.head = Node("head", 1)
        self.workers = [Node(f"worker{number}", cpus) for number, cpus in enumerate(self.worker_cpus)]
        self._starting: Node | None = None
        self.environment = self.store | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "4000",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def nodes(self) -> list[Node]:
        return [self.head, *self.workers]

    def supervise(self) -> None:
        """Start the next node that is down: the head first, the others once it answers, one at a time."""
        now = time.monotonic()
        if self._starting and now - self._starting.started < _LONGEST_START and not self._is_up(self._starting):
            return
        down = next((node for node in self.nodes if node.process is None or node.process.poll() is not None), None)
        if down is None or (down is not self.head and not self._answers()):
            return
        if down.process is not None:
            self.restarts += 1
            self.family.kill_tree(down.process.pid)
        self._start(down)
        self._starting = down

    def wait_until_up(self, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.supervise()
            if self._answers() and all(self.raylet(node) and self._is_up(node) for node in self.nodes):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the Ray cluster did not start; see {self.folder}/*.log")

    def raylet(self, node: Node) -> Process | None:
        """A node's raylet, if it lives."""
        if node.process is None or node.process.poll() is not None:
            return None
        below = self.family.below(node.process.pid)
        return next((process for process in below if _is_called(process, "/raylet/raylet")), None)

    def gcs(self) -> Process | None:
        """The head's table of the whole cluster."""
        if self.head.process is None:
            return None
        below = self.family.below(self.head.process.pid)
        return next((process for process in below if _is_called(process, "/gcs/gcs_server")), None)

    def working(self) -> list[Process]:
        """The processes that do a job's work at this moment: actors, post tasks, and whatever else is not Ray's own."""
        everyone = self.family.below()
        return [each for each in everyone if each.title.startswith("ray::") and not _RAYS_OWN.search(each.title)]

    def _is_up(self, node: Node) -> bool:
        """Its raylet has got so far that it has children, or it has failed."""
        raylet = self.raylet(node)
        return (
            bool(self.family.below(raylet.pid)) if raylet else node.process is None or node.process.poll() is not None
        )

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        return False

    def _start(self, node: Node) -> None:
        command = [str(RAY), "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={node.cpus}"]
        command += [f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats", "--include-log-monitor=false"]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0", "--num-gpus=0"]
        if node is self.head:
            command += ["--head", f"--port={self.port}", f"--temp-dir={self.folder}/r", "--include-dashboard=false"]
            command += [f"--ray-client-server-port={_lasting_port()}"]
        else:
            command += [f"--address={self.address}"]
        log = self.folder / f"{node.name}.log"
        node.process = self.family.start(command, self.environment, log, cwd=self.folder)
        node.starts += 1
        node.started = time.monotonic()


def _is_called(process: Process, program: str) -> bool:
    return process.title.split(" ")[0].endswith(program)


def _lasting_port() -> int:
    """A free port below those that the kernel gives to clients: it is still free when the head comes back."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
