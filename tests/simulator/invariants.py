"""I1-I7 and I9 while a schedule runs, at every change of the store; all of them, and I8, once it is over."""

from __future__ import annotations

import hashlib
import io
import re
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq

from jobs.outputs.ledger import chunk_of_path
from jobs.outputs.publish import MANIFEST_PATH, Publication
from jobs.plans.planned import PLAN_PATH, REJECTED_PATH
from tests.simulator.cast import CHUNKS, COLUMNS, SimulatedPlan, decode_once, finish_once, result_of, standing_plan
from tests.simulator.world import Violation, World

_OUR_PATHS = re.compile(
    r"_job/(plan\.json|rejected\.parquet|manifest-\d{16}-\d{5}\.parquet|\.probe-[0-9a-f]{16})"
    r"|images/\d{5}/\d{8}-[0-9a-f]{16}/\d{8}\.png|ledger/\d{5}/\d{8}\.parquet"
    r"|dataset/(part-\d{5}-[0-9a-f]{16}\.parquet|manifest\.json)"
)


class Watch:
    """Sees every change of the store at the moment it is made."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._objects = world.store.objects
        self._referenced: dict[str, int] = {}
        world.store.watchers.append(self)

    def __call__(self, path: str, before: bytes | None, after: bytes | None) -> None:
        if not _OUR_PATHS.fullmatch(path):
            self._world.report(f"I4: {path} is none of our places")
        elif path.startswith("ledger/"):
            self._record(path, before, after)
        elif path == PLAN_PATH and before is not None and before != after:
            self._world.report("I7: the plan was changed")
        elif path in self._referenced and before != after:
            kind = "I6: a referenced picture was deleted" if after is None else "I2: a referenced picture was changed"
            self._world.report(f"{kind}: {path}, of chunk {self._referenced[path]}")
        elif path == MANIFEST_PATH and after is not None:
            self._manifest(after)

    def _record(self, path: str, before: bytes | None, after: bytes | None) -> None:
        if before is not None and before != after:
            self._world.report(f"I5: the commit record {path} was {'deleted' if after is None else 'changed'}")
        chunk, plan = chunk_of_path(path), standing_plan(self._objects)
        if after is None or chunk is None or plan is None:
            self._world.report(f"I5: {path} is no commit record of a plan")
            return
        record = decode_once(after)
        if record.plan_hash != plan.plan_hash:
            self._world.report(f"I7: {path} is of plan {record.plan_hash[:12]}, the output of {plan.plan_hash[:12]}")
        rows = _rows(after)
        if [int(row["sample_id"]) for row in rows] != list(CHUNKS[chunk]):
            self._world.report(f"I1: {path} has not the samples of its chunk")
        for row in rows:
            if row["image"] is None:
                continue
            self._referenced[row["image"]] = chunk
            picture = self._objects.get(row["image"])
            if picture is None or len(picture) != row["bytes"] or _sha256(picture) != row["sha256"]:
                self._world.report(f"I2: {path} was committed, but {row['image']} does not lie there as it says")

    def _manifest(self, data: bytes) -> None:
        committed = sum(path.startswith("ledger/") for path in self._objects)
        if committed != len(CHUNKS):
            self._world.report(f"I9: published with {committed} of {len(CHUNKS)} chunks committed")
        for part in Publication.from_json(data).parts:
            stored = self._objects.get(part.path)
            if stored is None or _sha256(stored) != part.sha256:
                self._world.report(f"I9: published, but {part.path} does not lie there as the manifest says")


def check_end(world: World, plan: SimulatedPlan) -> None:
    """Every chunk is committed and published, exactly as an undisturbed run would have; and nothing else is left."""
    objects = world.store.objects
    _must(standing_plan(objects) == plan, "I7: the output has another plan than its driver")
    _must(objects.get(REJECTED_PATH) == plan.rejected, "I7: the rejected rows are another plan's")
    records = {chunk_of_path(path): data for path, data in objects.items() if path.startswith("ledger/")}
    _must(set(records) == set(range(len(CHUNKS))), f"I1: the ledger has chunks {sorted(map(str, records))}")
    committed = {row["sample_id"]: row for data in records.values() for row in _rows(data)}
    _must(sum(len(_rows(data)) for data in records.values()) == plan.n_samples == len(committed), "I1: rows twice")
    for row in committed.values():
        picture = objects.get(row["image"]) if row["image"] else b""
        _must(picture is not None, f"I2: {row['image']} is missing")
        _must(not row["image"] or _sha256(picture or b"") == row["sha256"], f"I2: {row['image']} was changed")
    _must(MANIFEST_PATH in objects, "I9: the driver ended, and nothing is published")
    publication = Publication.from_json(objects[MANIFEST_PATH])
    published: list[dict[str, Any]] = []
    for part in publication.parts:
        _must(_sha256(objects.get(part.path, b"")) == part.sha256, f"I9: {part.path} is not as the manifest says")
        published += _part(objects[part.path])
    _must(published == [committed[name] for name in sorted(committed)], "I1: the published rows are not the ledger's")
    anonymous = [row | {"image": row["image"] and re.sub(r"-[0-9a-f]{16}/", "-*/", row["image"])} for row in published]
    _must(anonymous == expected_rows(plan), "I3: the published rows are not those of an undisturbed run")


def check_swept(world: World) -> None:
    """After a last sweep, nothing is left of all that was lost."""
    objects = world.store.objects
    referenced = {row["image"] for path, data in objects.items() if path.startswith("ledger/") for row in _rows(data)}
    left = sorted(path for path in objects if path.startswith("images/") and path not in referenced)
    _must(not left, f"the sweeper left {left}")


@lru_cache
def expected_rows(plan: SimulatedPlan) -> list[dict[str, Any]]:
    """The rows of an undisturbed run, made without any protocol."""
    rows = {}
    for chunk in range(plan.n_chunks):
        for sample in plan.samples_of_chunk(chunk):
            done = finish_once(plan, sample, result_of(plan, sample.ordinal), "simulated")
            row = {name: done.row.get(name) for name in COLUMNS}
            if done.data is not None:
                row["image"] = f"images/00000/{chunk:08d}-*/{sample.sample_id}.png"
                row |= {"bytes": len(done.data), "sha256": _sha256(done.data)}
            rows[sample.ordinal] = row
    return [{name: rows[ordinal][name] for name in plan.record_schema.names} for ordinal in sorted(rows)]


def _must(holds: bool, problem: str) -> None:
    if not holds:
        raise Violation(problem)


@lru_cache(maxsize=20_000)
def _rows(record: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = decode_once(record).table.to_pylist()
    return rows


@lru_cache(maxsize=1000)
def _part(data: bytes) -> list[dict[str, Any]]:
    # without threads: on a busy machine it takes longer to wake one than to read a few rows
    rows: list[dict[str, Any]] = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False).to_pylist()
    return rows


@lru_cache(maxsize=1000)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
