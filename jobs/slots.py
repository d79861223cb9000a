"""Samples drawn once more, each in its slot of a full batch: what a retry, `repair` and `regenerate` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from latentmill.engine import GenerationRequest, GenerationResult, queue_rows


class DrawingEngine(Protocol):
    """The part of the engine that draws whole batches, checked."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]: ...


def slots_of(requests: Sequence[GenerationRequest], batch_size: int) -> list[int]:
    """The slot of each request of a chunk when the whole chunk is drawn."""
    slots = [0] * len(requests)
    for slot, queue in enumerate(queue_rows([request.loop for request in requests], batch_size)):
        for row in queue:
            slots[row] = slot
    return slots


def slot_batches(
    requests: Sequence[GenerationRequest], slots: Mapping[int, int], batch_size: int
) -> Iterator[tuple[list[GenerationRequest], dict[int, int]]]:
    """Batches in which each of the rows in `slots` has its slot, one of them fills the others; each batch's rows by
    slot. The requests are of one shape.
    """
    left = dict(slots)
    while left:
        places: dict[int, int] = {}
        for row, slot in left.items():
            places.setdefault(slot % batch_size, row)
        taken = set(places.values())
        left = {row: slot for row, slot in left.items() if row not in taken}
        filler = next(iter(places.values()))
        yield [requests[places.get(slot, filler)] for slot in range(batch_size)], places


def draw_in_slots(
    engine: DrawingEngine, requests: Sequence[GenerationRequest], slots: Mapping[int, int], batch_size: int
) -> Iterator[tuple[int, Iterator[GenerationResult]]]:
    """The rows in `slots` once more, each in its slot; for each, what came of it.

    The first result is the likeliest to have the same bits. Those after it, which are made when they are asked for,
    come from the row without neighbours and from other slots: a retry in full precision had one of its own.
    """
    for batch, places in slot_batches(requests, slots, batch_size):
        found = engine.generate(batch)
        for slot, row in places.items():
            yield row, _results(engine, requests[row], slot, found[slot], batch_size)


def _results(
    engine: DrawingEngine, request: GenerationRequest, slot: int, first: GenerationResult, batch_size: int
) -> Iterator[GenerationResult]:
    if first.batch_slot == slot:  # prompts of several lengths do not all go into one batch
        yield first
    alone = engine.generate([request] * batch_size)
    yield alone[slot]
    yield from alone
