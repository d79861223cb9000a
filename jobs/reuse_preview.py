"""What other outputs already hold of a plan, for `plan --reuse`: counted before anything is drawn or written."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.jobs.donors import find_donors
from latentmill.jobs.job import open_job
from latentmill.jobs.manifests.axes import Axis, models_of
from latentmill.jobs.manifests.fields import MODEL
from latentmill.jobs.manifests.loras import lora_of_axis
from latentmill.jobs.manifests.replacements import replaced_by
from latentmill.jobs.plans.draft import DraftPlan
from latentmill.jobs.plans.planned import Plan
from latentmill.jobs.plans.sample import PlannedSample
from latentmill.jobs.reuse import CellIndex

MAX_SAMPLES = 200_000
"""So many samples of the plan, in order of execution, are looked up."""

_SEEDS = (
    "less than half is held, and no axis and no column names the seeds: they follow from a sample's place, and in a "
    "job of another size nearly all of them are others. With seeds that are named in both jobs, as by --sweep seed=42, "
    "what was added is all that is drawn"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisValue:
    """How many of the samples with one value of a sweep axis are held already."""

    axis: str
    value: str
    held: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReusePreview:
    """What of a plan's samples other outputs hold; `held` counts by output.

    Cells are taken only where the run's execution class is one of `execution_classes`.
    """

    looked_at: int
    samples: int
    held: dict[str, int]
    axes: tuple[AxisValue, ...]
    execution_classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Samples, of those looked at, that need not be drawn."""
        return sum(self.held.values())

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"total": self.total}


def preview_reuse(draft: DraftPlan) -> ReusePreview | None:
    """What a run of this plan could take from the outputs of its `--reuse`; None without one. Writes nothing.

    Raises UsageError for an output that cannot be read.
    """
    if not draft.spec.runtime.reuse:
        return None
    plan = draft.plan()
    donors = find_donors(draft.spec.runtime.reuse, draft.spec.out).of(plan)
    indexes = [CellIndex(plan.of_model(number), donors.urls, None) for number in range(len(plan.models))]
    held, looked_at = dict.fromkeys((url for index in indexes for url in index.urls if url), 0), 0
    there: Counter[tuple[str, str]] = Counter()
    every: Counter[tuple[str, str]] = Counter()
    for chunk in range(plan.n_chunks):
        if looked_at >= MAX_SAMPLES:
            break
        for sample in plan.samples_of_chunk(chunk):
            looked_at += 1
            index = indexes[sample.model]
            cell = index.find(sample)
            values = [(axis.name, str(_value(plan, axis, sample))) for axis in plan.axes]
            every.update(values)
            if cell is not None:
                held[index.urls[cell.donor]] += 1
                there.update(values)
    order = [(axis.name, str(value)) for axis in plan.axes for value in axis.values]
    notes = [*donors.notes, *(note for index in indexes for note in index.notes())]
    moved = plan.seeds_follow_places and any(open_job(url).plan.n_samples != plan.n_samples for url in held)
    if moved and 2 * sum(held.values()) < looked_at:
        notes.append(_SEEDS)
    return ReusePreview(
        looked_at=looked_at,
        samples=plan.n_samples,
        held=held,
        axes=tuple(AxisValue(axis=key[0], value=key[1], held=there[key], samples=every[key]) for key in order),
        execution_classes=tuple(sorted(set[str]().union(*(index.execution_classes for index in indexes)))),
        notes=tuple(dict.fromkeys(notes)),
    )


def _value(plan: Plan, axis: Axis, sample: PlannedSample) -> Any:
    """The axis's value that a sample has."""
    lora = lora_of_axis(axis.name)
    if axis.name == MODEL:
        return models_of(plan.axes)[sample.model]
    if lora is not None:
        return next(value for value in axis.values if value == dict(sample.request.loras)[lora])
    return getattr(sample.request, axis.name) if replaced_by(axis.name) is None else sample.extra[axis.name]
