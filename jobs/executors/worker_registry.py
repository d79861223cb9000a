"""Who is at work on which chunk since when, which chunks break their workers, and which nodes cannot work at all.

One registry stands beside the driver of a Ray job, as an actor. Workers ask it before each chunk; it knows nothing of
the ledger and decides nothing about a chunk's end, so losing it loses only advice.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

POOLED_TRIES = 2
"""Tries at a chunk that may end in its worker's death, or in an exception, before it runs isolated."""

NODE_FAULTS = 12
"""Deaths and failures in a row on one node, with no chunk done in between, before the node is left out."""

START_TRIES = 3
"""Deaths of one worker in a row before its model is loaded, on a node where none is, before the node is left out."""

UNKNOWN_SECONDS = 600.0
"""What one sample may take while no chunk of its group is done yet: a large model on a slow CPU stays below."""

PATIENCE, LEAST_SECONDS = 20.0, 120.0
"""Later: so many times the slowest chunk of its group, and never less than this."""

_RECENT = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """What the driver wants to know, once a second."""

    ready: int
    """Workers with their model loaded."""
    begun: int
    """Chunks begun since the pass started."""
    overdue: tuple[Any, ...]
    """Handles of workers that are past their chunk's deadline and did not end themselves: stopped, or out of reach."""
    unfit: dict[str, str]
    """Nodes that cannot work, with the reason."""


@dataclass(slots=True)
class _Worker:
    handle: Any
    node: str
    ready: bool = False
    unborn: int = 0
    """Deaths in a row, on this node, while the model was loaded."""
    chunk: int | None = None
    since: float = 0.0
    deadline: float = 0.0


@dataclass(slots=True)
class _Node:
    faults: int = 0
    unfit: str | None = None


@dataclass(slots=True)
class WorkerRegistry:
    """Every method is one short message of a worker or of the driver; `clock` counts seconds.

    `chunk_seconds` is the user's own deadline for a chunk; without it, the deadline follows from what chunks of the
    same group took.
    """

    chunk_seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _nodes: dict[str, _Node] = field(default_factory=dict)
    _faults: Counter[int] = field(default_factory=Counter)
    _slowest: dict[int, float] = field(default_factory=dict)
    _begun: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _n_begun: int = 0
    _stopped: bool = False

    def start_pass(self) -> None:
        """New workers are about to come; those of the pass before are gone."""
        self._workers.clear()
        self._begun.clear()
        self._n_begun = 0
        self._stopped = False

    def enter(self, worker: str, node: str, handle: Any) -> bool:
        """A process begins to load the model. False if its node is unfit, so that it need not try.

        One that was at work under the same name has died: its chunk and its node may be at fault.
        """
        before = self._workers.get(worker)
        entry = self._workers[worker] = _Worker(handle=handle, node=node)
        if before is not None:
            self._note_fault(before, "its worker processes die one after the other")
            if before.node == node and not before.ready:
                entry.unborn = before.unborn + 1
                self._note_unborn(entry)
        return self._nodes.setdefault(node, _Node()).unfit is None

    def ready(self, worker: str) -> None:
        """The model is loaded."""
        if worker in self._workers:
            self._workers[worker].ready = True

    def unfit(self, node: str, reason: str) -> None:
        """Nothing can work there: no chunk should go there again."""
        self._nodes.setdefault(node, _Node()).unfit = reason

    def begin(self, worker: str, chunk: int, group: int, samples: int) -> float | None:
        """The seconds that the worker may take for a chunk; None if it must not begin it.

        A worker that is not known here is one from before this registry was lost and started again.
        """
        if self._stopped or self._faults[chunk] >= POOLED_TRIES:
            return None
        entry = self._workers.setdefault(worker, _Worker(handle=None, node="", ready=True))
        entry.chunk, entry.since, entry.deadline = chunk, self.clock(), self.deadline(group, samples)
        self._begun.append(chunk)
        self._n_begun += 1
        return entry.deadline

    def done(self, worker: str, group: int) -> None:
        """The worker has generated its chunk: chunks of this group take about so long."""
        entry = self._workers.get(worker)
        if entry is not None and entry.chunk is not None:
            self._slowest[group] = max(self._slowest.get(group, 0.0), self.clock() - entry.since)
            self._nodes.setdefault(entry.node, _Node()).faults = 0
            entry.chunk = None

    def left(self, worker: str, fault: str | None) -> None:
        """The worker could not generate its chunk: for a `fault` that may be the chunk's, or for none of its doing."""
        entry = self._workers.get(worker)
        if entry is not None:
            if fault is not None:
                self._note_fault(entry, fault)
            entry.chunk = None

    def blame(self, chunk: int) -> None:
        """The chunk was generated, and what came after it failed in a way that may be its fault."""
        self._faults[chunk] += 1

    def deadline(self, group: int, samples: int) -> float:
        """Seconds that a chunk of a group may take."""
        if self.chunk_seconds is not None:
            return self.chunk_seconds
        known = self._slowest.get(group)
        return samples * UNKNOWN_SECONDS if known is None else max(LEAST_SECONDS, PATIENCE * known)

    def suspects(self) -> list[int]:
        """Chunks that are to run isolated."""
        return sorted(chunk for chunk, count in self._faults.items() if count >= POOLED_TRIES)

    def stop(self) -> list[int]:
        """No chunk begins from now on, until the next pass. The chunks that may still be under way."""
        self._stopped = True
        return list(self._begun)

    def overview(self, grace: float) -> Overview:
        """A worker past its deadline by `grace` seconds did not even end itself."""
        now = self.clock()
        return Overview(
            ready=sum(worker.ready for worker in self._workers.values()),
            begun=self._n_begun,
            overdue=tuple(
                worker.handle
                for worker in self._workers.values()
                if worker.handle is not None
                and worker.chunk is not None
                and now > worker.since + worker.deadline + grace
            ),
            unfit={name: node.unfit for name, node in self._nodes.items() if node.unfit is not None},
        )

    def _note_unborn(self, worker: _Worker) -> None:
        others = any(other.ready for other in self._workers.values() if other.node == worker.node)
        node = self._nodes.setdefault(worker.node, _Node())
        if worker.unborn >= START_TRIES and not others and node.unfit is None:
            node.unfit = f"a worker process died {worker.unborn} times in a row while it loaded the model"

    def _note_fault(self, worker: _Worker, reason: str) -> None:
        node = self._nodes.setdefault(worker.node, _Node())
        node.faults += 1
        if node.faults >= NODE_FAULTS and node.unfit is None:
            node.unfit = f"{node.faults} failures in a row, the last: {reason}"
        if worker.chunk is not None:
            self._faults[worker.chunk] += 1
            worker.chunk = None
