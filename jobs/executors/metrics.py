"""What Prometheus may know of a run: the table of metrics, and what each result adds to them. Ray exports them.

All is counted by the driver as results come: in one place, which outlives any worker. It counts this run's own work, so
the counts of all runs of an output add up to its rows.
"""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.plans.columns import STATUSES

OUTPUT = "output"
"""The label that every metric has: which job it is."""

LOOK_SECONDS = 1.0
"""Gauges are set no more often than this while the workers stay the same; Ray exports every ten seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure as Prometheus knows it. `labels` are those beside `output`.

    Seconds are counters and no histograms, because the agent of a Ray node rebuilds histograms from the middles of
    their buckets (2.60), and sums of those are not what was measured.
    """

    kind: Literal["counter", "gauge"]
    what: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "latentmill_images_total": Metric(
        kind="counter", what="samples that this run committed, by what became of them", labels=("status",)
    ),
    "latentmill_images_reused_total": Metric(kind="counter", what="those of them that another output had (`--reuse`)"),
    "latentmill_chunks_total": Metric(
        kind="counter",
        what="tries at chunks, by how they ended: `committed`, `error` (it is tried again), `lost` (another driver was "
        "first), `already`, `unrepaired`",
        labels=("outcome",),
    ),
    "latentmill_stage_seconds_total": Metric(
        kind="counter",
        what="seconds in each stage of chunks that came to an end, by the worker's host. Those of `sample` say how "
        "long it was drawing, without any waiting",
        labels=("stage", "node"),
    ),
    "latentmill_worker_deaths_total": Metric(
        kind="counter", what="workers that died, or were ended past their deadline", labels=("node",)
    ),
    "latentmill_workers": Metric(kind="gauge", what="workers with their model loaded", labels=("node",)),
    "latentmill_worker_seconds_total": Metric(
        kind="counter",
        what="seconds that they had it. Those of `sample` by these are the share of time in which they were drawing",
        labels=("node",),
    ),
    "latentmill_chunks_queued": Metric(kind="gauge", what="chunks that no worker has yet"),
    "latentmill_chunks_in_flight": Metric(
        kind="gauge", what="chunks that a worker has: one being sampled, one waiting, up to two being finished"
    ),
    "latentmill_images_left": Metric(kind="gauge", what="samples of this run that no commit record has yet"),
}


class Sink(Protocol):
    """Where figures go. `labels` are those of the metric, without `output`."""

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Raise a counter by a value above 0."""

    def put(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""


class RunMetrics:
    """Adds up one run. `host_of` gives the host name of a node of Ray."""

    def __init__(self, sink: Sink, host_of: Callable[[str], str] = lambda node: node) -> None:
        self._sink = sink
        self._host_of = host_of
        self._left = 0
        self._repair = False
        self._workers: Counter[str] = Counter()
        self._deaths_told: Counter[str] = Counter()
        self._told_at = -math.inf

    def begin(self, samples: int, *, repair: bool) -> None:
        """A pass over chunks of so many samples begins. Those of a repair are in commit records already."""
        self._repair = repair
        self._left = 0 if repair else samples
        self._sink.put("latentmill_images_left", self._left, {})

    def add(self, result: ChunkResult) -> None:
        """A try at a chunk has ended."""
        self._sink.add("latentmill_chunks_total", 1, {"outcome": result.outcome})
        host = result.actor.rpartition(":")[0] or socket.gethostname()
        for stage, seconds in result.stages.items():
            self._add("latentmill_stage_seconds_total", seconds, {"stage": stage, "node": host})
        counts = {status: getattr(result, status) for status in STATUSES}
        if result.outcome == "committed":
            for status, samples in counts.items():
                if not (self._repair and status == "failed"):  # what failed again is in no record
                    self._add("latentmill_images_total", samples, {"status": status})
            self._add("latentmill_images_reused_total", result.reused, {})
        if result.done and not self._repair:
            self._left = max(0, self._left - sum(counts.values()))
            self._sink.put("latentmill_images_left", self._left, {})

    def look(self, *, workers: Sequence[str], deaths: Mapping[str, int], queued: int, in_flight: int) -> None:
        """How things stand: the nodes of the workers with a model, and how often workers died on each node so far."""
        if time.monotonic() - self._told_at >= LOOK_SECONDS or len(workers) != self._workers.total():
            self._tell(Counter(map(self._host_of, workers)), deaths, queued, in_flight)

    def end(self, deaths: Mapping[str, int]) -> None:
        """Nothing is at work any more."""
        self._tell(Counter(), deaths, 0, 0)

    def _tell(self, workers: Counter[str], deaths: Mapping[str, int], queued: int, in_flight: int) -> None:
        now = time.monotonic()
        for host, number in self._workers.items():
            self._add("latentmill_worker_seconds_total", number * (now - self._told_at), {"node": host})
        self._told_at = now
        self._workers = Counter({host: workers[host] for host in {*self._workers, *workers}})
        for host, number in self._workers.items():
            self._sink.put("latentmill_workers", number, {"node": host})
        for node, times in (Counter(deaths) - self._deaths_told).items():
            self._sink.add("latentmill_worker_deaths_total", times, {"node": self._host_of(node)})
        self._deaths_told = Counter(deaths)
        self._sink.put("latentmill_chunks_queued", queued, {})
        self._sink.put("latentmill_chunks_in_flight", in_flight, {})

    def _add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        if value > 0:  # a counter takes nothing else
            self._sink.add(name, value, labels)
