"""Ray clusters of several nodes on this machine: one head, workers that come and die, and a token that guards them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.ports import free_ports
from tests.harness.processes import Process, below, kill_tree, start_process

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
STORE_BYTES = 128_000_000
DEAD_AFTER_A_SECOND = {"RAY_health_check_failure_threshold": "2", "RAY_health_check_period_ms": "500"}


@dataclass
class Node:
    """One raylet with all that belongs to it; `process` is its `ray start --block`, once it was started."""

    name: str
    cpus: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def raylet(self) -> Process | None:
        """Its raylet, if it lives."""
        return self.find("/raylet/raylet")

    @property
    def gcs(self) -> Process | None:
        """A head's table of the whole cluster, if it lives."""
        return self.find("/gcs/gcs_server")

    def find(self, program: str) -> Process | None:
        """The process of this node whose program's path ends so."""
        if self.process is None or not self.runs:
            return None
        everyone = below(self.process.pid)
        return next((process for process in everyone if process.title.split(" ")[0].endswith(program)), None)

    def kill(self) -> None:
        """SIGKILL to everything of this node at once, as a machine that loses its power."""
        if self.process is not None:
            kill_tree(self.process.pid)
            self.process.wait(30)


@dataclass(kw_only=True)
class Cluster:
    """A head, its workers, and the variables of their processes. Nothing runs until a node is started."""

    folder: Path
    """Short, for Ray puts sockets far below it."""
    head: Node
    environment: dict[str, str]
    flags: tuple[str, ...] = ()
    """More flags of every node's `ray start`."""
    dashboard_port: int | None = None
    start_process: Callable[..., subprocess.Popen[bytes]] = start_process
    workers: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port, self._client_port = free_ports(2)

    @property
    def nodes(self) -> list[Node]:
        return [self.head, *self.workers]

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

    def define_worker(self, *, cpus: int) -> Node:
        """One more node, which is not started yet."""
        name = f"worker{len(self.workers)}"
        self.workers.append(Node(name, cpus, self.folder / f"{name}.log"))
        return self.workers[-1]

    def add_worker(self, *, cpus: int) -> Node:
        """Start one more raylet. It is part of the cluster some seconds later."""
        node = self.define_worker(cpus=cpus)
        self.start(node)
        return node

    def start(self, node: Node) -> None:
        """Start a node, the first time or again; it is up some seconds later."""
        command = [str(RAY), "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={node.cpus}"]
        command += ["--num-gpus=0", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", *self.flags]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        if node is self.head:
            command += ["--head", f"--port={self.port}", f"--temp-dir={self.folder}/r"]
            command += [f"--ray-client-server-port={self._client_port}"]
            command += [f"--include-dashboard={json.dumps(self.dashboard_port is not None)}"]
            command += [f"--dashboard-port={self.dashboard_port}"] if self.dashboard_port else []
        else:
            command += [f"--address={self.address}"]
        node.process = self.start_process(command, self.environment, node.log, cwd=self.folder)
        node.started = time.monotonic()

    def answers(self) -> bool:
        """Whether the head takes connections."""
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        return False

    def wait_for_head(self) -> None:
        """Until the head, and its dashboard if it has one, answer."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.head.runs:
            if self.answers() and (self.dashboard_port is None or _answers_http(f"{self.dashboard}/api/version")):
                return
            time.sleep(0.1)
        raise AssertionError(f"the head did not start: {self.head.log.read_text()[-2000:]}")

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.kill()


def prepare_cluster(
    folder: Path,
    *,
    head_cpus: int = 1,
    dashboard: bool = False,
    token: bool = True,
    environment: Mapping[str, str] | None = None,
    flags: tuple[str, ...] = (),
    start_process: Callable[..., subprocess.Popen[bytes]] = start_process,
) -> Cluster:
    """A cluster in an empty folder, guarded by a token of its own unless told otherwise; nothing runs yet."""
    (folder / "home").mkdir()
    settings = {"HOME": str(folder / "home"), "PATH": f"{RAY.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    settings |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    if token:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
    return Cluster(
        folder=folder,
        head=Node("head", head_cpus, folder / "head.log"),
        environment={**settings, **(environment or {})},
        flags=flags,
        dashboard_port=free_ports(1)[0] if dashboard else None,
        start_process=start_process,
    )


@contextlib.contextmanager
def cluster(
    *, head_cpus: int = 1, dashboard: bool = False, token: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """A head node that is up, in a folder of its own; it and all workers are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lmn-", dir="/tmp"))
    settings = {**DEAD_AFTER_A_SECOND, **(environment or {})}
    nodes = prepare_cluster(folder, head_cpus=head_cpus, dashboard=dashboard, token=token, environment=settings)
    try:
        nodes.start(nodes.head)
        nodes.wait_for_head()
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _answers_http(url: str) -> bool:
    """Whether a server answers, if only by asking who we are."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code in {401, 403}
    except OSError:
        return False
    return True
