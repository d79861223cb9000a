"""Ray clusters of several nodes on this machine: one head, workers that come and die, and a token that guards them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[3]
RAY = Path(sys.executable).with_name("ray")
STORE_BYTES = 100_000_000


@dataclass
class Node:
    """One raylet with what belongs to it; `process` is its `ray start --block`."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL to everything of this node at once, as a machine that loses its power."""
        family = [self.process.pid, *descendants(self.process.pid)]
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none of them can react
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
        self.process.wait(30)


@dataclass
class Nodes:
    """A cluster at `address`, its nodes, and the variables by which a driver is let in."""

    folder: Path
    port: int
    dashboard_port: int | None
    environment: dict[str, str]
    head: Node | None = None
    workers: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What a driver or a client needs to be let in."""
        return {name: value for name, value in self.environment.items() if name.startswith("RAY_AUTH")}

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    def start_head(self, *, cpus: int, resources: str = "{}") -> None:
        flags = [
            "--head",
            f"--port={self.port}",
            f"--temp-dir={self.folder}/r",
            f"--ray-client-server-port={free_ports(1)[0]}",
        ]
        flags += [f"--include-dashboard={'true' if self.dashboard_port else 'false'}"]
        flags += [f"--dashboard-port={self.dashboard_port}"] if self.dashboard_port else []
        self.head = self._start("head", flags, cpus, resources)
        self._wait_for_port(self.port, self.head)
        if self.dashboard_port:
            self._wait_for_dashboard()

    def add_worker(self, *, cpus: int, resources: str = "{}") -> Node:
        """Start one more raylet. It is part of the cluster some seconds later."""
        node = self._start(f"worker{len(self.workers)}", [f"--address={self.address}"], cpus, resources)
        self.workers.append(node)
        return node

    def stop(self) -> None:
        for node in [*self.workers, *([self.head] if self.head else [])]:
            node.kill()

    def _start(self, name: str, flags: list[str], cpus: int, resources: str) -> Node:
        log = self.folder / f"{name}.log"
        command = [str(RAY), "start", *flags, "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}"]
        command += ["--num-gpus=0", f"--resources={resources}", f"--object-store-memory={STORE_BYTES}"]
        command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **self.environment}, start_new_session=True
            )
        return Node(process, log)

    def _wait_for_port(self, port: int, node: Node) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and node.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            time.sleep(0.1)
        raise AssertionError(f"the node did not start: {node.log.read_text()[-2000:]}")

    def _wait_for_dashboard(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2).close()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in {401, 403}:
                    return
            except OSError:
                pass
            else:
                return
            time.sleep(0.2)
        raise AssertionError("the dashboard did not start")


@contextlib.contextmanager
def cluster(
    *, head_cpus: int = 1, dashboard: bool = False, token: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[Nodes]:
    """A head node that is up, guarded by a token of its own unless told otherwise; all of it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lmn-", dir="/tmp"))  # short: Ray puts sockets far below
    ports = free_ports(2)
    (folder / "home").mkdir()
    settings = {"RAY_AUTH_MODE": "disabled", "HOME": str(folder / "home")}
    if token:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
    settings |= {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}
    settings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    settings |= {"RAY_health_check_failure_threshold": "2", "RAY_health_check_period_ms": "500"}
    nodes = Nodes(folder, ports[0], ports[1] if dashboard else None, {**settings, **(environment or {})})
    try:
        nodes.start_head(cpus=head_cpus)
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """The processes below one, as they are now."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    found, below = [], [pid]
    while below:
        children = parents.get(below.pop(), [])
        found += children
        below += children
    return found


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
