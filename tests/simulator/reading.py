"""What stands in the store, told without the code under test."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from latentmill.jobs.ledger.ledger import record_path, repair_of_path, repair_path
from latentmill.jobs.ledger.records import decode_record
from latentmill.jobs.plans.planned import PLAN_PATH
from tests.simulator.plans import PLAN_BY_HASH, SimulatedPlan

decode_once = lru_cache(maxsize=20_000)(decode_record)


def standing_plan(objects: dict[str, bytes]) -> SimulatedPlan | None:
    """The plan of the output."""
    data = objects.get(PLAN_PATH)
    return None if data is None else PLAN_BY_HASH[json.loads(data)["plan_hash"]]


def effective_rows(objects: dict[str, bytes], chunk: int) -> dict[str, dict[str, Any]]:
    """The rows of a chunk after its repairs, by sample; found without the code under test. Empty if it is open."""
    rows: dict[str, dict[str, Any]] = {}
    number = 0
    while (data := objects.get(repair_path(chunk, number) if number else record_path(chunk))) is not None:
        rows |= {row["sample_id"]: row for row in record_rows(data)}
        number += 1
    return rows


def failed_samples(objects: dict[str, bytes], plan: SimulatedPlan) -> set[int]:
    """Ordinals that fail as things stand; those of open chunks will fail at first."""
    failed = set(plan.poisoned)
    for chunk in range(plan.n_chunks):
        failed -= {int(name) for name, row in effective_rows(objects, chunk).items() if row["status"] != "failed"}
    return failed


@lru_cache(maxsize=20_000)
def record_rows(record: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = decode_once(record).table.to_pylist()
    return rows


def repairs_in(objects: dict[str, bytes]) -> int:
    """Repair records in all."""
    return sum(repair_of_path(path) is not None for path in objects)
