"""Repeated figures and what is said of them: the median, the spread, and the ratios of runs that belong together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured quantity, with all its repetitions in the order in which they were made."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        """For a result's document; the median is there for its readers."""
        return asdict(self) | {"median": self.median}


def figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    """A figure of these repetitions, of which there must be one."""
    if not values:
        raise ValueError(f"figure {name!r} has no value")
    return Figure(name=name, unit=unit, values=tuple(float(value) for value in values))


def ratio(name: str, theirs: Sequence[float], ours: Sequence[float]) -> Figure:
    """How many times as long the peer took as we did, run by run: above 1, we are faster."""
    return figure(name, "x", [peer / own for peer, own in zip(theirs, ours, strict=True)])


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender measures, in rounds of all of them; every other round goes backwards.

    So a machine that gets slower or faster meanwhile does so for all.
    """
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            values[name].append(contenders[name]())
    return values
