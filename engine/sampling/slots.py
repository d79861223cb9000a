"""Rows through one batch of a fixed number of slots: where a row is done, the next one of the slot's queue begins.

The U-Net sees all slots in every pass, and a row's bits do not depend on its neighbours there. All other arithmetic is
that of a *lane*: neighbouring slots whose rows take the same steps at the same time, with the same numbers whether a
lane is one row wide or the whole batch. So a row's bits depend on its request and the batch's shape alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from latentmill.engine.sampling.denoiser import Denoiser
from latentmill.engine.sampling.noise_level import NoiseLevel
from latentmill.engine.sampling.queues import Loop, queue_rows
from latentmill.engine.sampling.solvers import Solver


@dataclass(frozen=True, slots=True)
class Finished:
    """A row's final latents `(c, h, w) float32`, and the slot that it had."""

    row: int
    slot: int
    latents: Tensor


@dataclass(slots=True)
class _Lane:
    """What its solver asks for now. Without a solver its rows are done, and only keep the batch's shape."""

    rows: list[int]
    solver: Solver | None
    latents: Tensor
    level: NoiseLevel


def run_in_slots(
    loops: Sequence[Loop],
    slots: int,
    begin: Callable[[list[int]], Solver],
    condition: Callable[[list[int]], Denoiser],
) -> Iterator[list[Finished]]:
    """Every row once, as rows get done.

    `begin` starts the solver of rows that share a loop; `condition` makes the denoiser for the rows in all slots, one
    after the other. Where rows are too few for the slots, the last one is repeated.
    """
    queues = [deque(queue) for queue in queue_rows(loops, slots)]
    lanes = _begin([queue.popleft() if queue else len(loops) - 1 for queue in queues], loops, begin)
    occupants: list[int] = []
    while any(lane.solver for lane in lanes):
        rows = [row for lane in lanes for row in lane.rows]
        if rows != occupants:
            occupants, denoiser = rows, condition(rows)
        finished = _step(lanes, denoiser)
        if finished:
            yield finished
            lanes = _refill(lanes, queues, loops, begin)


def _begin(rows: list[int], loops: Sequence[Loop], begin: Callable[[list[int]], Solver]) -> list[_Lane]:
    """Lanes of rows that are about to take their first step."""
    lanes = []
    for _, alike in groupby(rows, lambda row: loops[row]):
        together = list(alike)
        solver = begin(together)
        lanes.append(_Lane(together, solver, *next(solver)))
    return lanes


def _step(lanes: list[_Lane], denoiser: Denoiser) -> list[Finished]:
    """One run of the U-Net for all lanes; returns the rows that it was the last one for."""
    widths = [len(lane.rows) for lane in lanes]
    latents = lanes[0].latents if len(lanes) == 1 else torch.cat([lane.latents for lane in lanes])
    timesteps = torch.cat(
        [
            torch.full((width,), float(lane.level.timestep), device=latents.device)
            for lane, width in zip(lanes, widths, strict=True)
        ]
    )
    outputs = torch.split(denoiser.run(latents, timesteps), widths)
    finished: list[Finished] = []
    slot = 0
    for lane, width, output in zip(lanes, widths, outputs, strict=True):
        if lane.solver is not None:
            try:
                lane.latents, lane.level = lane.solver.send(denoiser.predict(output, lane.latents, lane.level))
            except StopIteration as end:
                lane.solver, lane.latents = None, end.value
                finished += [
                    Finished(row, slot + index, lane.latents[index])
                    for index, row in enumerate(lane.rows)
                    if row not in lane.rows[:index]
                ]
        slot += width
    return finished


def _refill(
    lanes: list[_Lane], queues: list[deque[int]], loops: Sequence[Loop], begin: Callable[[list[int]], Solver]
) -> list[_Lane]:
    """The lanes with new rows in the slots of those that are done, as far as the slots' queues have any."""
    filled: list[_Lane] = []
    left = iter(queues)
    for lane in lanes:
        own = [next(left) for _ in lane.rows]
        if lane.solver is not None:
            filled.append(lane)
            continue
        following = [queue.popleft() if queue else None for queue in own]
        for idle, group in groupby(enumerate(following), lambda entry: entry[1] is None):
            places, rows = zip(*group, strict=True)
            if idle:
                part = slice(places[0], places[-1] + 1)
                filled.append(_Lane(lane.rows[part], None, lane.latents[part], lane.level))
            else:
                filled += _begin([row for row in rows if row is not None], loops, begin)
    return filled
