"""What can be wrong with an output, and how a single row is held to its plan and to the rules of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from latentmill.jobs.ledger.picture_store import picture_path
from latentmill.jobs.ledger.records import CommitRecord
from latentmill.jobs.plans.columns import stored, values
from latentmill.jobs.plans.plan import Plan, PlannedSample
from latentmill.jobs.store.errors import StorageError

Kind = Literal[
    "chunk-missing",
    "record-damaged",
    "record-stray",
    "repair-wrong",
    "row-wrong",
    "image-missing",
    "image-damaged",
    "pixels-changed",
    "source-unstated",
    "not-published",
    "publication-stale",
    "part-damaged",
    "part-stray",
    "captions-damaged",
    "dataset-wrong",
    "scores-wrong",
    "not-reproduced",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """One thing that is not as it should be."""

    kind: Kind
    path: str
    detail: str


def lasting(error: Exception) -> str:
    """What a defect says of an error. That of a store that does not answer is raised: it says nothing of the output."""
    if isinstance(error, StorageError) and error.transient:
        raise error
    return str(error)


def row_defects(path: str, rows: list[dict[str, Any]], samples: list[PlannedSample], plan: Plan) -> Iterator[Defect]:
    """The rows are those of the plan: each sample once, in order, with the parameters that were asked for."""
    found, planned = [row["sample_id"] for row in rows], [sample.sample_id for sample in samples]
    if found != planned:
        repeated = sorted({sample for sample in found if found.count(sample) > 1})
        detail = f"sample {repeated[0]} is there more than once" if repeated else "its samples are not those planned"
        yield Defect(kind="row-wrong", path=path, detail=detail)
        return
    columns = plan.columns
    for row, sample in zip(rows, samples, strict=True):
        expected = values(columns, "sample", sample) | plan.constants_of(sample.model)
        wrong = [
            column.name
            for column in columns
            if column.name in expected and row[column.name] != stored(column, expected[column.name])
        ]
        if wrong:
            detail = f"sample {sample.sample_id}: {', '.join(wrong)} not as the plan asked for"
            yield Defect(kind="row-wrong", path=path, detail=detail)


def is_own_picture(row: dict[str, Any], record: CommitRecord) -> bool:
    """Whether the row's picture has the name that one of the record's attempts gives it."""
    return any(
        row["image"] == picture_path(record.chunk, attempt, row["sample_id"], repair)
        for repair, attempt in enumerate(record.attempts)
    )


def rule_defects(path: str, row: dict[str, Any], plan: Plan) -> Iterator[Defect]:
    """No row may claim what it cannot: the first column whose rule it breaks."""
    rules = (column.rule for column in plan.columns if column.rule is not None)
    wrong = next((fault for rule in rules if (fault := rule(row, plan)) is not None), None)
    if wrong is not None:
        yield Defect(kind="row-wrong", path=path, detail=f"sample {row['sample_id']}: {wrong}")
