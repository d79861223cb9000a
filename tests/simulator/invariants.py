"""I1-I7 and I9 while a schedule runs, at every change of the store; all of them, and I8, once it is over."""

from __future__ import annotations

import hashlib
import io
import re
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq

from latentmill.jobs.ledger.ledger import chunk_of_path, record_path, repair_of_path, repair_path
from latentmill.jobs.outputs.publish import MANIFEST_PATH, Publication
from latentmill.jobs.plans.planned import PLAN_PATH, REJECTED_PATH
from tests.simulator.cast import postprocess_once
from tests.simulator.plans import CHUNKS, COLUMNS, SimulatedPlan, result_of
from tests.simulator.reading import decode_once, effective_rows, failed_samples, record_rows, repairs_in, standing_plan
from tests.simulator.world import Violation, World

_OUR_PATHS = re.compile(
    r"_job/(plan\.json|dataset\.json|rejected\.parquet|manifest-\d{16}-\d{5}\.parquet|\.probe-[0-9a-f]{16})"
    r"|images/\d{5}/\d{8}-(r[1-9]\d*-)?[0-9a-f]{16}/\d{8}\.png|ledger/\d{5}/\d{8}(\.r[1-9]\d*)?\.parquet"
    r"|dataset/part-\d{5}-[0-9a-f]{16}\.parquet|images/\d{5}/metadata\.parquet|README\.md"
)


class Watch:
    """Sees every change of the store at the moment it is made."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._objects = world.store.objects
        self._referenced: dict[str, int] = {}
        self.sleepers = 0
        """Manifests that were older than the ledger when they were written."""
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
            self._world.report(f"I5: the record {path} was {'deleted' if after is None else 'changed'}")
        repair, plan = repair_of_path(path), standing_plan(self._objects)
        chunk = chunk_of_path(path) if repair is None else repair[0]
        if after is None or chunk is None or plan is None:
            self._world.report(f"I5: {path} is no record of a plan")
            return
        record = decode_once(after)
        if record.plan_hash != plan.plan_hash:
            self._world.report(f"I7: {path} is of plan {record.plan_hash[:12]}, the output of {plan.plan_hash[:12]}")
        rows = record_rows(after)
        if repair is not None:
            self._repair(path, chunk, repair[1], rows)
        elif [int(row["sample_id"]) for row in rows] != list(CHUNKS[chunk]):
            self._world.report(f"I1: {path} has not the samples of its chunk")
        for row in rows:
            if row["image"] is None:
                continue
            self._referenced[row["image"]] = chunk
            picture = self._objects.get(row["image"])
            if picture is None or len(picture) != row["bytes"] or _sha256(picture) != row["sha256"]:
                self._world.report(f"I2: {path} was committed, but {row['image']} does not lie there as it says")

    def _repair(self, path: str, chunk: int, number: int, rows: list[dict[str, Any]]) -> None:
        """It comes right after the one before it, and changes nothing but rows that failed until now."""
        before = {name: self._objects[name] for name in self._objects if name != path}
        if number > 1 and repair_path(chunk, number - 1) not in before:
            self._world.report(f"I5: {path} has no repair {number - 1} before it")
        failed = {name for name, row in effective_rows(before, chunk).items() if row["status"] == "failed"}
        repaired = {row["sample_id"] for row in rows if row["status"] != "failed"}
        if not repaired <= failed or len(repaired) != len(rows) or not rows:
            self._world.report(f"I5: {path} repairs {sorted(repaired)} in {len(rows)} rows, {sorted(failed)} failed")

    def _manifest(self, data: bytes) -> None:
        committed = sum(chunk_of_path(path) is not None for path in self._objects)
        if committed != len(CHUNKS):
            self._world.report(f"I9: published with {committed} of {len(CHUNKS)} chunks committed")
        publication = Publication.from_json(data)
        if publication.repairs < repairs_in(self._objects):
            self.sleepers += 1  # frozen right before this write: whoever looks next replaces it
            return
        for part in publication.parts:
            stored = self._objects.get(part.path)
            if stored is None or _sha256(stored) != part.sha256:
                self._world.report(f"I9: published, but {part.path} does not lie there as the manifest says")


def check_end(world: World, plan: SimulatedPlan) -> None:
    """Every chunk is committed and published, exactly as an undisturbed run would have; and nothing else is left."""
    objects = world.store.objects
    _must(standing_plan(objects) == plan, "I7: the output has another plan than its driver")
    _must(objects.get(REJECTED_PATH) == plan.rejected, "I7: the rejected rows are another plan's")
    records = {path for path in objects if path.startswith("ledger/") and repair_of_path(path) is None}
    _must(records == {record_path(chunk) for chunk in range(len(CHUNKS))}, f"I1: the ledger has {sorted(records)}")
    effective = [effective_rows(objects, chunk) for chunk in range(len(CHUNKS))]
    committed = {name: row for rows in effective for name, row in rows.items()}
    _must(sum(map(len, effective)) == plan.n_samples == len(committed), "I1: rows twice")
    for row in committed.values():
        picture = objects.get(row["image"]) if row["image"] else b""
        _must(picture is not None, f"I2: {row['image']} is missing")
        _must(not row["image"] or _sha256(picture or b"") == row["sha256"], f"I2: {row['image']} was changed")
    _must(MANIFEST_PATH in objects, "I9: the driver ended, and nothing is published")
    publication = Publication.from_json(objects[MANIFEST_PATH])
    _must(publication.repairs == repairs_in(objects), "I9: the publication lacks repairs")
    published: list[dict[str, Any]] = []
    for part in publication.parts:
        _must(_sha256(objects.get(part.path, b"")) == part.sha256, f"I9: {part.path} is not as the manifest says")
        published += _part(objects[part.path])
    _must(published == [committed[name] for name in sorted(committed)], "I1: the published rows are not the ledger's")
    anonymous = [
        row | {"image": row["image"] and re.sub(r"-(r\d+-)?[0-9a-f]{16}/", "-*/", row["image"])} for row in published
    ]
    expected = expected_rows(plan, frozenset(failed_samples(objects, plan)))
    _must(anonymous == expected, "I3: the published rows are not those of an undisturbed run")
    counts = {status: sum(row["status"] == status for row in published) for status in publication.counts}
    _must(counts == publication.counts, "I9: the publication counts other rows than it has")


def check_cleaned(world: World) -> None:
    """After a last cleaning, days later, nothing is left of all that was lost or superseded."""
    objects = world.store.objects
    publication = Publication.from_json(objects[MANIFEST_PATH])
    named = {part.path for part in (*publication.parts, *publication.captions)}
    for path, data in objects.items():
        if path.startswith("ledger/"):
            named |= {row["image"] for row in record_rows(data)}
    left = sorted(path for path in objects if path.startswith(("images/", "dataset/")) and path not in named)
    _must(not left, f"the cleaner left {left}")


@lru_cache
def expected_rows(plan: SimulatedPlan, failed: frozenset[int]) -> list[dict[str, Any]]:
    """The rows of an undisturbed run in which just these samples failed, made without any protocol."""
    rows = {}
    for chunk in range(plan.n_chunks):
        for sample in plan.samples_of_chunk(chunk):
            result = result_of(plan, sample.ordinal, failed=sample.ordinal in failed)
            done = postprocess_once(plan, sample, result, "simulated")
            row = {name: done.row.get(name) for name in COLUMNS}
            if done.data is not None:
                row["image"] = f"images/00000/{chunk:08d}-*/{sample.sample_id}.png"
                row |= {"bytes": len(done.data), "sha256": _sha256(done.data)}
            rows[sample.ordinal] = row
    return [{name: rows[ordinal][name] for name in plan.record_schema.names} for ordinal in sorted(rows)]


def _must(holds: bool, problem: str) -> None:
    if not holds:
        raise Violation(problem)


@lru_cache(maxsize=1000)
def _part(data: bytes) -> list[dict[str, Any]]:
    # without threads: on a busy machine it takes longer to wake one than to read a few rows
    rows: list[dict[str, Any]] = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False).to_pylist()
    return rows


@lru_cache(maxsize=1000)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
