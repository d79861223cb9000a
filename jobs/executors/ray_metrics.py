"""The figures of a run as metrics of Ray: every node's agent shows those of its processes to Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentmill.jobs.executors.metrics import METRICS, OUTPUT, RunMetrics
from latentmill.jobs.job import Job

EXPORTED_PREFIX = "ray_"
"""What Ray puts before the names."""

_MOST_LETTERS = 64


def ray_metrics(job: Job, nodes: Callable[[], Sequence[Mapping[str, Any]]]) -> RunMetrics:
    """The metrics of a run of this job, within a session of Ray. `nodes` says what the cluster consists of."""
    return RunMetrics(_RaySink(output_label(job.url, job.plan.plan_hash)), _Hosts(nodes))


def output_label(url: str, plan_hash: str) -> str:
    """One for each output and plan. It does not say where the output is: anyone who reaches a node's port reads it."""
    name = url.partition("?")[0].rstrip("/").rpartition("/")[2][:_MOST_LETTERS]
    return f"{name}-{plan_hash[:8]}"


class _RaySink:
    def __init__(self, output: str) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds = {"counter": Counter, "gauge": Gauge}
        self._metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            made = kinds[metric.kind](name, description=metric.what, tag_keys=(OUTPUT, *metric.labels))
            self._metrics[name] = made.set_default_tags({OUTPUT: output})

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].inc(value, labels)

    def put(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].set(value, labels)


class _Hosts:
    """Host names of nodes, asked for when there is a new one."""

    def __init__(self, nodes: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._nodes = nodes
        self._known: dict[str, str] = {}

    def __call__(self, node: str) -> str:
        if node not in self._known:
            self._known |= {each["NodeID"]: each["NodeManagerHostname"] for each in self._nodes()}
        return self._known.setdefault(node, "unknown")
