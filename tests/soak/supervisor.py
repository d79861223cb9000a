"""A supervisor's patience with a cluster: what dies is started again, the head first, one node at a time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from tests.harness.cluster import Cluster, Node, prepare_cluster
from tests.harness.processes import Family, Process, below, kill_tree

_RAYS_OWN = re.compile("IDLE|Agent|_StatsActor|_AutoscalingCoordinator|ActorLocationTracker")
_LONGEST_START = 15.0
"""Two raylets that start at once on one machine choose the same socket and one dies: each waits for the one before."""
_SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
}


def soak_cluster(family: Family, folder: Path, store: dict[str, str], worker_cpus: tuple[int, ...]) -> Cluster:
    """A head and some workers, none of them started, whose processes find the object store by `store`."""
    cluster = prepare_cluster(
        folder, environment=_SETTINGS | store, flags=("--include-log-monitor=false",), start_process=family.start
    )
    for cpus in worker_cpus:
        cluster.define_worker(cpus=cpus)
    return cluster


@dataclass
class Supervisor:
    """`supervise` has to be called all the time."""

    cluster: Cluster
    restarts: int = 0
    _starting: Node | None = None

    def supervise(self) -> None:
        """Start the next node that is down: the head first, the others once it answers, one at a time."""
        now = time.monotonic()
        if self._starting and now - self._starting.started < _LONGEST_START and not _is_up(self._starting):
            return
        down = next((node for node in self.cluster.nodes if not node.runs), None)
        if down is None or (down is not self.cluster.head and not self.cluster.answers()):
            return
        if down.process is not None:
            self.restarts += 1
            kill_tree(down.process.pid)
        self.cluster.start(down)
        self._starting = down

    def wait_until_up(self, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.supervise()
            if self.cluster.answers() and all(node.raylet and _is_up(node) for node in self.cluster.nodes):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the Ray cluster did not start; see {self.cluster.folder}/*.log")


def working() -> list[Process]:
    """The processes that do a job's work at this moment: actors, postprocessing, and whatever else is not Ray's own."""
    return [each for each in below() if each.title.startswith("ray::") and not _RAYS_OWN.search(each.title)]


def _is_up(node: Node) -> bool:
    """Its raylet has got so far that it has children, or it has failed."""
    raylet = node.raylet
    return bool(below(raylet.pid)) if raylet else not node.runs
