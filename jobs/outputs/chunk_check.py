"""One chunk read again: its record and repairs against the plan, its pictures against its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.ledger import LedgerListing, record_path, repair_path
from latentmill.jobs.ledger.pictures import decode_png, pixel_sha256, stated_source_type
from latentmill.jobs.ledger.records import CommitRecord, WrongRepairError
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.outputs.defects import Defect, is_own_picture, lasting, row_defects, rule_defects


@dataclass(slots=True)
class ChunkFindings:
    """What was read of a chunk, or of several, and what is wrong."""

    rows: int = 0
    images: int = 0
    bytes: int = 0
    defects: tuple[Defect, ...] = ()


class ChunkCheck:
    """Checks chunks with those of their repairs that a listing has; reads the pictures of `chosen` samples, or all."""

    def __init__(self, job: Job, listing: LedgerListing, chosen: frozenset[int] | None) -> None:
        self._job = job
        self._listing = listing
        self._chosen = chosen

    def findings(self, chunk: int) -> ChunkFindings:
        """What its rows and pictures are, and what is wrong with them."""
        path = record_path(chunk)
        try:
            record = self._job.ledger.read(chunk)
        except JobError as error:
            return ChunkFindings(defects=(Defect(kind="record-damaged", path=path, detail=lasting(error)),))
        if record is None:
            return ChunkFindings(defects=(Defect(kind="chunk-missing", path=path, detail="it is not committed"),))
        record, defects = self._repaired(record)
        rows: list[dict[str, Any]] = record.table.to_pylist()
        findings = ChunkFindings(rows=len(rows))
        defects.extend(row_defects(path, rows, self._job.plan.samples_of_chunk(chunk), self._job.plan))
        for row in rows:
            defects.extend(rule_defects(path, row, self._job.plan))
            if row["image"] is None:
                continue
            if not is_own_picture(row, record):
                detail = f"sample {row['sample_id']}: its image is {row['image']!r}, which no attempt at it wrote"
                defects.append(Defect(kind="row-wrong", path=path, detail=detail))
            elif self._is_chosen(row["sample_id"]):
                defects.extend(self._picture_defects(row, findings))
        findings.defects = tuple(defects)
        return findings

    def _repaired(self, record: CommitRecord) -> tuple[CommitRecord, list[Defect]]:
        """The record with those repairs that were listed, as far as they are sound."""
        while record.repairs < self._listing.repairs.get(record.chunk, 0):
            path = repair_path(record.chunk, record.repairs + 1)
            try:
                further = self._job.ledger.with_next_repair(record)
            except WrongRepairError as error:
                return record, [Defect(kind="repair-wrong", path=path, detail=str(error))]
            except JobError as error:
                return record, [Defect(kind="record-damaged", path=path, detail=lasting(error))]
            if further is None:
                return record, [
                    Defect(kind="repair-wrong", path=path, detail="it is missing, and a later one is there")
                ]
            record = further
        return record, []

    def _is_chosen(self, sample_id: str) -> bool:
        return self._chosen is None or (sample_id.isdecimal() and int(sample_id) in self._chosen)

    def _picture_defects(self, row: dict[str, Any], findings: ChunkFindings) -> Iterator[Defect]:
        path = row["image"]
        try:
            data = self._job.pictures.read(path, row["bytes"] or 0)
        except FileNotFoundError:
            yield Defect(kind="image-missing", path=path, detail=f"sample {row['sample_id']} refers to it")
            return
        except JobError as error:
            yield Defect(kind="image-damaged", path=path, detail=lasting(error))
            return
        findings.images += 1
        findings.bytes += len(data)
        if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
            detail = f"{len(data)} bytes that do not match the {row['bytes']} bytes committed"
            yield Defect(kind="image-damaged", path=path, detail=detail)
            return
        try:
            pixels = decode_png(data, (row["width"], row["height"]))
        except ValueError as error:
            yield Defect(kind="pixels-changed", path=path, detail=str(error))
            return
        if pixel_sha256(pixels) != row["pixel_sha256"]:
            yield Defect(kind="pixels-changed", path=path, detail="its pixels do not match those committed")
        stated, expected = stated_source_type(data), row.get("digital_source_type")
        if expected is not None and stated != expected:
            detail = f"its XMP states {'no source type' if stated is None else shorten(stated)}, not {expected}"
            yield Defect(kind="source-unstated", path=path, detail=detail)
