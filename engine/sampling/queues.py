"""Which rows each slot of a batch works on, one after the other. Without torch: the planner counts with it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from latentmill.engine.sampling.table import SAMPLER_TABLE

Loop = tuple[str, int] | tuple[str, int, int]
"""A sampler and its number of steps, and of rows that start from an image how many of the last ones they take.

Rows with one loop can take every step together.
"""


def passes(loop: Loop) -> int:
    """About how often a row with that loop needs the model: what it costs."""
    sampler, steps = loop[0], loop[-1]
    return steps * (SAMPLER_TABLE[sampler].passes if sampler in SAMPLER_TABLE else 1)


def queue_rows(loops: Sequence[Loop], slots: int) -> list[list[int]]:
    """For each slot of a batch, the places of its rows in order.

    No more rows than slots stay where they are. Of more, the longest come first, each to the slot that has the least to
    do so far (Graham's rule, doi:10.1137/0117039): at most a third longer than the best order takes.
    """
    order: Sequence[int] = range(len(loops))
    if len(loops) > slots:
        order = sorted(order, key=lambda row: (-passes(loops[row]), loops[row]))
    queues: list[list[int]] = [[] for _ in range(slots)]
    loads = [(0, slot) for slot in range(slots)]
    for row in order:
        load, slot = loads[0]
        queues[slot].append(row)
        heapq.heapreplace(loads, (load + passes(loops[row]), slot))
    return queues


def count_passes(loops: Sequence[Loop], slots: int) -> int:
    """About how many runs of the model at a full batch the rows take."""
    return max(sum(passes(loops[row]) for row in queue) for queue in queue_rows(loops, slots))
