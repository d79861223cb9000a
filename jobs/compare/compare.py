"""`latentmill compare`: what is the same in two published datasets, what changed, by how much, what is new or gone."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from latentmill.jobs.compare.distance import Distance, distance
from latentmill.jobs.compare.matching import OUTCOME, REQUEST, Matching, Numbers, match
from latentmill.jobs.compare.side import Side
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.fields import nearest, shorten
from latentmill.jobs.outputs.latest import MAX_DAYS, named_night, night_before
from latentmill.jobs.plans.plan import Plan, differences_of
from latentmill.jobs.store.urls import display_url

MAX_TOP = 10_000
MAX_TOLERANCE = 2.0

IGNORABLE = tuple(name for name in REQUEST if name not in {"width", "height"})
"""Parameters that may be left out of the matching; pictures of two sizes have no distance."""

ASKED = tuple("init_image" if name == "image" else name for name in REQUEST)
"""The columns that tell a request to people."""

ROW = (*ASKED, "sample_id", "row_id", "status", "error", "image", "bytes", "sha256", "pixel_sha256")
_BLOCK = 16_384
"""Changed pairs whose rows are in memory at once."""


class CompareError(JobError):
    """Two datasets cannot be compared. Exit code 1 says that they differ, so this is another."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareProgress:
    """How far it is, in pairs whose pictures differ."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A request whose outcome changed: its row in each dataset. `distance` is None where one has no picture."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    distance: Distance | None

    @property
    def order(self) -> tuple[bool, float, float]:
        """What sorts pairs by how much changed: another status first, then what is seen, then the pixels."""
        apart = self.distance
        other_status = self.before["status"] != self.after["status"] or apart is None
        return (other_status, apart.perceptual if apart else 0.0, apart.pixel if apart else 0.0)

    def within(self, tolerance: float) -> bool:
        """Whether it counts as unchanged."""
        other_status, perceptual, _ = self.order
        return not other_status and perceptual <= tolerance

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        apart = self.distance
        both = {name: [self.before[name], self.after[name]] for name in ASKED}
        return {
            **{name: self.after[name] for name in (*ASKED, "row_id")},
            "differs": {name: values for name, values in both.items() if values[0] != values[1]},
            "sample_before": self.before["sample_id"],
            "sample_after": self.after["sample_id"],
            "status_before": self.before["status"],
            "status_after": self.after["status"],
            "image_before": self.before["image"],
            "image_after": self.after["image"],
            "pixel_distance": None if apart is None else apart.pixel,
            "greatest_difference": None if apart is None else apart.greatest,
            "perceptual_distance": None if apart is None else apart.perceptual,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between two datasets. `pairs`, `added_rows` and `removed_rows` are the first of them, `top` at most.

    `changed` counts neither those pairs that are within the tolerance, nor those that are identical.
    """

    before: Side
    after: Side
    tolerance: float
    ignored: tuple[str, ...]
    identical: int
    within_tolerance: int
    changed: int
    added: int
    removed: int
    pairs: tuple[Pair, ...]
    """The biggest change first."""
    added_rows: tuple[Mapping[str, Any], ...]
    removed_rows: tuple[Mapping[str, Any], ...]
    settings: tuple[str, ...]
    """What differs between the two jobs beside their rows, as `name: before -> after`."""

    @property
    def exit_code(self) -> int:
        """0 if nothing differs beyond the tolerance, 1 otherwise."""
        return 1 if self.changed or self.added or self.removed else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        listed = ("sample_id", "row_id", *ASKED, "status")
        return {
            "before": self.before.url,
            "after": self.after.url,
            "identical": self.identical,
            "changed": self.changed,
            "added": self.added,
            "removed": self.removed,
            "within_tolerance": self.within_tolerance,
            "tolerance": self.tolerance,
            "ignored": list(self.ignored),
            "settings": list(self.settings),
            "pairs": [pair.to_dict() for pair in self.pairs],
            "added_samples": [{name: row[name] for name in listed} for row in self.added_rows],
            "removed_samples": [{name: row[name] for name in listed} for row in self.removed_rows],
        }


def compare(
    first: str,
    second: str | None,
    *,
    top: int,
    tolerance: float = 0.0,
    ignored: Sequence[str] = (),
    on_progress: Callable[[CompareProgress], None] = lambda _: None,
) -> Comparison:
    """Compare the dataset `first` with the later one, `second`; without that, with the one of the night before `first`.

    Pictures are read only of pairs whose pixels differ. Raises CompareError if there is nothing to compare, a dataset
    is not published, or a picture is not as its row says.
    """
    try:
        _check(top, tolerance, ignored)
        before, after = (Side(place) for place in nights(first, second))
        total = max(before.publication.rows, after.publication.rows)
        on_progress(CompareProgress(phase="matching rows", done=0, total=total))
        request = _request(before, after, ignored)
        matching = match(before.batches((*request, *OUTCOME)), after.batches((*request, *OUTCOME)), request)
        return _compared(before, after, matching, top, tolerance, tuple(ignored), on_progress)
    except JobError as error:
        raise CompareError(str(error)) from error


def _request(before: Side, after: Side, ignored: Sequence[str]) -> list[str]:
    """The columns in which the two rows of a pair agree: as far as one of the datasets has them.

    The model is one of them only where a dataset has several: of two models, each in a job of its own, pictures are to
    be compared.
    """
    several = any(len(side.job.plan.models) > 1 for side in (before, after))
    counted = {name: column for name, column in REQUEST.items() if name not in ignored and (name != "model" or several)}
    return [column for column in counted.values() if before.has(column) or after.has(column)]


def _compared(
    before: Side,
    after: Side,
    matching: Matching,
    top: int,
    tolerance: float,
    ignored: tuple[str, ...],
    on_progress: Callable[[CompareProgress], None],
) -> Comparison:
    biggest: list[tuple[tuple[bool, float, float], int, Pair]] = []
    total, near = len(matching.changed), 0
    for number, pair in enumerate(_pairs(before, after, matching.changed)):
        if pair.within(tolerance):
            near += 1
        else:
            # the number decides between equal ones, so that the first stay and pairs are never compared themselves
            (heapq.heappush if len(biggest) < top else heapq.heappushpop)(biggest, (pair.order, -number, pair))
        on_progress(CompareProgress(phase="comparing pictures", done=number + 1, total=total))
    return Comparison(
        before=before,
        after=after,
        tolerance=tolerance,
        ignored=ignored,
        identical=matching.identical,
        within_tolerance=near,
        changed=total - near,
        added=len(matching.added),
        removed=len(matching.removed),
        pairs=tuple(pair for *_, pair in sorted(biggest, key=lambda entry: entry[:2], reverse=True)),
        added_rows=tuple(after.rows(matching.added[:top].tolist(), ROW)),
        removed_rows=tuple(before.rows(matching.removed[:top].tolist(), ROW)),
        settings=tuple(_settings(before, after)),
    )


def _pairs(before: Side, after: Side, numbers: Numbers) -> Iterator[Pair]:
    """The pairs at these places with their distances, in order. Memory holds the pictures of a few."""

    def measured(rows: tuple[dict[str, Any], dict[str, Any]]) -> Pair:
        one, other = rows
        both = one["image"] is not None and other["image"] is not None
        apart = distance(before.picture(one), after.picture(other)) if both else None
        return Pair(before=one, after=other, distance=apart)

    with ThreadPoolExecutor(_threads()) as pool:
        for start in range(0, len(numbers), _BLOCK):
            block = numbers[start : start + _BLOCK]
            rows = zip(before.rows(block[:, 0].tolist(), ROW), after.rows(block[:, 1].tolist(), ROW), strict=True)
            while few := list(islice(rows, 256)):  # an error ends it soon, and not after the whole block
                yield from pool.map(measured, few)


def _threads() -> int:
    """As many as read at once from a bucket, or decode at once where there are more cores."""
    return max(8, len(os.sched_getaffinity(0)))


def _check(top: int, tolerance: float, ignored: Sequence[str]) -> None:
    if not 0 <= top <= MAX_TOP:
        raise UsageError(f"top is {top}; give 0 to {MAX_TOP:,}")
    if not 0 <= tolerance <= MAX_TOLERANCE:
        raise UsageError(f"tolerance is {tolerance:g}; give 0 to {MAX_TOLERANCE:g}, which is as far as 1 - SSIM goes")
    for name in ignored:
        if name not in IGNORABLE:
            raise UsageError(
                f"ignore {shorten(name)} is no parameter that can be left out{nearest(name, IGNORABLE)}; there is "
                f"{', '.join(IGNORABLE)}"
            )


def nights(first: str, second: str | None) -> tuple[str, str]:
    """The places of both outputs; of one alone, the output of the night before it and itself.

    Raises JobError if there is no such night.
    """
    if second is not None:
        return _output(first), _output(second)
    night = named_night(first)
    if night is None:
        raise UsageError(
            f"{display_url(first)} is not named by a day, and there is no pointer {display_url(first)}.json; name two "
            f"outputs: latentmill compare BEFORE AFTER"
        )
    earlier = night_before(night)
    if earlier is None:
        raise JobError(
            f"there is no published output before {display_url(night.out)}, in {MAX_DAYS} days; name two outputs: "
            f"latentmill compare BEFORE AFTER"
        )
    return earlier.out, night.out


def _output(place: str) -> str:
    night = named_night(place)
    return place if night is None else night.out


def _settings(before: Side, after: Side) -> Iterator[str]:
    one, other = before.job.plan, after.job.plan
    yield from _models(one, other)
    yield from differences_of(one.identity, other.identity)
    for name in sorted(one.versions.keys() | other.versions.keys()):
        if one.versions.get(name) != other.versions.get(name):
            yield f"version of {name}: {one.versions.get(name, 'absent')} -> {other.versions.get(name, 'absent')}"
    classes = [", ".join(side.publication.execution_classes) for side in (before, after)]
    if classes[0] != classes[1]:
        yield f"execution class: {classes[0]} -> {classes[1]}"


def _models(one: Plan, other: Plan) -> Iterator[str]:
    """Which models are other ones, by name; of two jobs with one model each, whatever they are called."""
    old, new = (
        {model.source: "unusable" if model.fault else model.digest[:12] for model in plan.models}
        for plan in (one, other)
    )
    if len(old) == len(new) == 1 and old != new:
        (before,), (after,) = old.items(), new.items()
        yield f"model: {before[0]} ({before[1]}) -> {after[0]} ({after[1]})"
        return
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield f"model {name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
