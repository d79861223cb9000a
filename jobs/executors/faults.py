"""Which chunks break their workers, which nodes cannot work at all, and how long a chunk may take.

Only the executor that keeps this reads it; it knows nothing of the ledger and decides nothing about a chunk's end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

POOLED_TRIES = 2
"""Tries at a chunk that may end in its worker's death, or in an exception, before it runs isolated."""

NODE_FAULTS = 12
"""Deaths and failures in a row on one node, with no chunk done in between, before the node is left out."""

START_TRIES = 3
"""Deaths of one worker in a row before its model is loaded, on a node where none is, before the node is left out."""

UNKNOWN_SECONDS = 600.0
"""What one sample may take while no chunk of its pace is done yet: a large model on a slow CPU stays below."""

PATIENCE, LEAST_SECONDS = 20.0, 120.0
"""Later: so many times the slowest chunk of its pace, and never less than this."""


@dataclass(slots=True)
class Faults:
    """What went wrong so far in a run, by chunk and by node.

    `chunk_seconds` is the user's own deadline for a chunk; without it, the deadline follows from what chunks of the
    same pace took: those whose longest rows are of one group. `unfit` are the nodes that are left out, with the
    reason; `deaths` are those of workers by node, whoever is at fault.
    """

    chunk_seconds: float | None = None
    unfit: dict[str, str] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    _chunks: Counter[int] = field(default_factory=Counter)
    _nodes: Counter[str] = field(default_factory=Counter)
    _slowest: dict[Hashable, float] = field(default_factory=dict)

    def blame(self, chunk: int) -> None:
        """A try at the chunk ended in a way that may be its fault."""
        self._chunks[chunk] += 1

    def is_suspect(self, chunk: int) -> bool:
        """Whether the chunk is to run isolated."""
        return self._chunks[chunk] >= POOLED_TRIES

    def note_death(self, node: str) -> None:
        """A worker there died, or was ended."""
        self.deaths[node] += 1

    def note_failure(self, node: str, reason: str) -> None:
        """A worker there died or failed, by its chunk's fault or the node's."""
        self._nodes[node] += 1
        if self._nodes[node] >= NODE_FAULTS:
            self.unfit.setdefault(node, f"{self._nodes[node]} failures in a row, the last: {reason}")

    def note_stillborn(self, node: str, times: int) -> None:
        """A worker died there that many times in a row before its model was loaded, as did all others beside it."""
        if times >= START_TRIES:
            reason = f"a worker process died {times} times in a row while it loaded the model"
            self.unfit.setdefault(node, reason)

    def note_done(self, node: str, pace: Hashable, seconds: float) -> None:
        """A chunk of that pace was generated there in so many seconds."""
        self._nodes[node] = 0
        self._slowest[pace] = max(self._slowest.get(pace, 0.0), seconds)

    def deadline(self, pace: Hashable, samples: int) -> float:
        """Seconds that a chunk of that pace may take."""
        if self.chunk_seconds is not None:
            return self.chunk_seconds
        known = self._slowest.get(pace)
        return samples * UNKNOWN_SECONDS if known is None else max(LEAST_SECONDS, PATIENCE * known)
