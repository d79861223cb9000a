"""What can be wrong with an output, and the rules that a single row has to obey."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from latentmill.jobs.ledger.picture_store import picture_path
from latentmill.jobs.ledger.records import STATUSES, CommitRecord
from latentmill.jobs.plans.plan import Plan, PlannedSample

Kind = Literal[
    "chunk-missing",
    "record-damaged",
    "record-stray",
    "repair-wrong",
    "row-wrong",
    "image-missing",
    "image-damaged",
    "pixels-changed",
    "not-published",
    "publication-stale",
    "part-damaged",
    "part-stray",
    "captions-damaged",
    "dataset-wrong",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """One thing that is not as it should be."""

    kind: Kind
    path: str
    detail: str


def row_defects(path: str, rows: list[dict[str, Any]], samples: list[PlannedSample], plan: Plan) -> Iterator[Defect]:
    """The rows are those of the plan: each sample once, in order, with the parameters that were asked for."""
    found, planned = [row["sample_id"] for row in rows], [sample.sample_id for sample in samples]
    if found != planned:
        repeated = sorted({sample for sample in found if found.count(sample) > 1})
        detail = f"sample {repeated[0]} is there more than once" if repeated else "its samples are not those planned"
        yield Defect(kind="row-wrong", path=path, detail=detail)
        return
    constants = _stored({name: value for name, value in plan.row_constants.items() if name in rows[0]})
    for row, sample in zip(rows, samples, strict=True):
        wrong = [name for name, value in {**_expected(sample), **constants}.items() if row[name] != value]
        if wrong:
            detail = f"sample {sample.sample_id}: {', '.join(wrong)} not as the plan asked for"
            yield Defect(kind="row-wrong", path=path, detail=detail)


def _expected(sample: PlannedSample) -> dict[str, Any]:
    """What the plan fixes of one row."""
    request = sample.request
    return _stored(
        {
            "row_id": sample.row_id,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "sampler": request.sampler,
            "eta": request.eta,
        }
    )


def _stored(values: dict[str, Any]) -> dict[str, Any]:
    """The values as a row's types store them."""
    return {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in values.items()}


def is_own_picture(row: dict[str, Any], record: CommitRecord) -> bool:
    """Whether the row's picture lies where one of the attempts whose rows these are has put it."""
    return any(
        row["image"] == picture_path(record.chunk, attempt, row["sample_id"], repair)
        for repair, attempt in enumerate(record.attempts)
    )


def status_defects(path: str, row: dict[str, Any], plan: Plan) -> Iterator[Defect]:
    """No row may claim what it cannot: `ok` needs a picture and a verdict, `failed` a reason."""
    status, wrong = row["status"], None
    if status not in STATUSES:
        wrong = f"its status is {status!r}"
    elif status == "failed" and (row["error"] is None or row["image"] is not None):
        wrong = "it failed, without a reason or with a picture"
    elif status == "ok" and row["image"] is None:
        wrong = "it is ok, without a picture"
    elif status == "flagged" and (row["image"] is None) != (plan.settings.on_flagged == "drop"):
        wrong = f"it is flagged, and its picture does not follow the policy {plan.settings.on_flagged!r}"
    elif status != "failed" and (
        row["nsfw_checker"] is None or (row["nsfw_checker"] == "none") != (plan.settings.safety == "none")
    ):
        wrong = f"its safety checker is {row['nsfw_checker']!r}, the plan says {plan.settings.safety!r}"
    if wrong is not None:
        yield Defect(kind="row-wrong", path=path, detail=f"sample {row['sample_id']}: {wrong}")
