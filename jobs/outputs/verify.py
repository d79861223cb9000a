"""Read everything again and say what is not as it was written."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import JobError
from jobs.job import Job, open_job
from jobs.outputs.images import decode_png, pixel_sha256
from jobs.outputs.ledger import chunk_of_path, record_path
from jobs.outputs.publish import MANIFEST_PATH, ROWS_PER_PART, Part, Publication, load_publication, merged_tables
from jobs.outputs.records import STATUSES, CommitRecord
from jobs.plans.plan import PlannedSample

Kind = Literal[
    "chunk-missing",
    "record-damaged",
    "record-stray",
    "row-wrong",
    "image-missing",
    "image-damaged",
    "pixels-changed",
    "not-published",
    "part-damaged",
    "part-stray",
    "dataset-wrong",
]
_THREADS = 8
_MAX_DEFECTS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """One thing that is not as it should be."""

    kind: Kind
    path: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was read, and what was wrong with it."""

    out: str
    plan_hash: str
    chunks: int
    rows: int
    images_checked: int
    bytes_read: int
    parts_checked: int
    defects: tuple[Defect, ...]

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong."""
        return 1 if self.defects else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": self.exit_code}


def verify(
    out_url: str,
    *,
    sample_n: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> VerifyReport:
    """Checks the ledger against the plan, every picture against its row, and the published dataset against the ledger.

    `sample_n` reads only that many pictures, chosen at random; records and dataset are always read whole.
    `on_progress` gets chunks done and in all. Raises UsageError if the output has no plan.
    """
    open_job.cache_clear()
    checker = _Checker(open_job(out_url), sample_n)
    checker.check_chunks(on_progress)
    checker.check_strays()
    checker.check_dataset()
    return checker.report()


@dataclass(slots=True)
class _ChunkFindings:
    rows: int = 0
    images: int = 0
    bytes: int = 0
    defects: tuple[Defect, ...] = ()


class _Checker:
    def __init__(self, job: Job, sample_n: int | None) -> None:
        self._job = job
        self._total = _ChunkFindings()
        self._defects: list[Defect] = []
        self._parts = 0
        self._chosen: frozenset[int] | None = None
        if sample_n is not None and sample_n < job.plan.n_samples:
            self._chosen = frozenset(random.sample(range(job.plan.n_samples), sample_n))

    def report(self) -> VerifyReport:
        return VerifyReport(
            out=self._job.storage.url,
            plan_hash=self._job.plan.plan_hash,
            chunks=self._job.plan.n_chunks,
            rows=self._total.rows,
            images_checked=self._total.images,
            bytes_read=self._total.bytes,
            parts_checked=self._parts,
            defects=tuple(sorted(self._defects, key=lambda defect: (defect.kind, defect.path, defect.detail))),
        )

    def check_chunks(self, on_progress: Callable[[int, int], None]) -> None:
        """Every chunk of the plan, several at a time, with a bounded number under way."""
        chunks, done = iter(range(self._job.plan.n_chunks)), 0
        running: set[Future[_ChunkFindings]] = set()
        with ThreadPoolExecutor(_THREADS) as pool:
            while True:
                while len(running) < 2 * _THREADS and (chunk := next(chunks, None)) is not None:
                    running.add(pool.submit(self._check_chunk, chunk))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._add(future.result())
                done += len(finished)
                on_progress(done, self._job.plan.n_chunks)

    def _add(self, findings: _ChunkFindings) -> None:
        self._total.rows += findings.rows
        self._total.images += findings.images
        self._total.bytes += findings.bytes
        self._defects.extend(findings.defects[: _MAX_DEFECTS - len(self._defects)])

    def _check_chunk(self, chunk: int) -> _ChunkFindings:
        path = record_path(chunk)
        try:
            record = self._job.ledger.read(chunk)
        except JobError as error:
            return _ChunkFindings(defects=(Defect(kind="record-damaged", path=path, detail=str(error)),))
        if record is None:
            return _ChunkFindings(defects=(Defect(kind="chunk-missing", path=path, detail="it is not committed"),))
        rows: list[dict[str, Any]] = record.table.to_pylist()
        findings = _ChunkFindings(rows=len(rows))
        defects = list(_row_defects(path, rows, self._job.plan.samples_of_chunk(chunk)))
        for row in rows:
            defects.extend(self._status_defects(path, row))
            if row["image"] is not None and self._is_chosen(row["sample_id"]):
                defects.extend(self._picture_defects(row, findings))
        findings.defects = tuple(defects)
        return findings

    def _is_chosen(self, sample_id: str) -> bool:
        return self._chosen is None or (sample_id.isdecimal() and int(sample_id) in self._chosen)

    def _status_defects(self, path: str, row: dict[str, Any]) -> Iterator[Defect]:
        """No row may claim what it cannot: `ok` needs a picture and a verdict, `failed` a reason."""
        plan, status = self._job.plan, row["status"]
        wrong = None
        if status not in STATUSES:
            wrong = f"its status is {status!r}"
        elif status == "failed" and (row["error"] is None or row["image"] is not None):
            wrong = "it failed, without a reason or with a picture"
        elif status == "ok" and row["image"] is None:
            wrong = "it is ok, without a picture"
        elif status == "flagged" and (row["image"] is None) != (plan.on_flagged == "drop"):
            wrong = f"it is flagged, and its picture does not follow the policy {plan.on_flagged!r}"
        elif status != "failed" and (
            row["nsfw_checker"] is None or (row["nsfw_checker"] == "none") != (plan.safety == "none")
        ):
            wrong = f"its safety checker is {row['nsfw_checker']!r}, the plan says {plan.safety!r}"
        if wrong is not None:
            yield Defect(kind="row-wrong", path=path, detail=f"sample {row['sample_id']}: {wrong}")

    def _picture_defects(self, row: dict[str, Any], findings: _ChunkFindings) -> Iterator[Defect]:
        path = row["image"]
        try:
            data = self._job.sink.read(path)
        except FileNotFoundError:
            yield Defect(kind="image-missing", path=path, detail=f"sample {row['sample_id']} refers to it")
            return
        except JobError as error:
            yield Defect(kind="image-damaged", path=path, detail=str(error))
            return
        findings.images += 1
        findings.bytes += len(data)
        if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
            detail = f"{len(data)} bytes that do not match the {row['bytes']} bytes committed"
            yield Defect(kind="image-damaged", path=path, detail=detail)
            return
        try:
            pixels = decode_png(data)
        except ValueError as error:
            yield Defect(kind="pixels-changed", path=path, detail=str(error))
            return
        if pixel_sha256(pixels) != row["pixel_sha256"] or pixels.shape[:2] != (row["height"], row["width"]):
            yield Defect(kind="pixels-changed", path=path, detail="its pixels do not match those committed")

    def check_strays(self) -> None:
        """Nothing lies in the ledger but the records of the plan's chunks."""
        for path, _ in self._job.storage.list("ledger"):
            chunk = chunk_of_path(path)
            if chunk is None or chunk >= self._job.plan.n_chunks:
                self._defects.append(Defect(kind="record-stray", path=path, detail="the plan has no such chunk"))

    def check_dataset(self) -> None:
        """The published parts hold exactly the ledger's rows, in order."""
        publication = load_publication(self._job)
        if publication is None:
            self._defects.append(
                Defect(kind="not-published", path=MANIFEST_PATH, detail="it is absent, damaged or another plan's")
            )
            return
        known = {part.path for part in publication.parts} | {MANIFEST_PATH}
        for path, _ in self._job.storage.list("dataset"):
            if path not in known:
                self._defects.append(Defect(kind="part-stray", path=path, detail="the manifest does not name it"))
        if any(defect.kind in {"chunk-missing", "record-damaged", "row-wrong"} for defect in self._defects):
            for part in publication.parts:
                self._read_part(part)  # without a sound ledger the parts can only be held against their digests
            return
        self._compare_parts(publication)

    def _compare_parts(self, publication: Publication) -> None:
        rows_per_part = publication.parts[0].rows if publication.parts else ROWS_PER_PART
        tables = merged_tables(self._job, self._fetch, rows_per_part)
        for part, expected in zip(publication.parts, tables, strict=False):
            table = self._read_part(part)
            if table is not None and not table.equals(expected):
                self._wrong(part.path, "its rows are not those of the ledger")
        total = sum(part.rows for part in publication.parts)
        if total != self._job.plan.n_samples or publication.rows != total or sum(publication.counts.values()) != total:
            self._wrong(MANIFEST_PATH, f"its totals do not add up to {self._job.plan.n_samples} samples")

    def _read_part(self, part: Part) -> pa.Table | None:
        try:
            data = self._job.storage.read(part.path)
        except (FileNotFoundError, JobError) as error:
            self._defects.append(Defect(kind="part-damaged", path=part.path, detail=f"not readable: {error}"))
            return None
        self._parts += 1
        self._total.bytes += len(data)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            detail = f"{len(data)} bytes that do not match the digest in {MANIFEST_PATH}"
            self._defects.append(Defect(kind="part-damaged", path=part.path, detail=detail))
            return None
        return pq.read_table(io.BytesIO(data))

    def _fetch(self, chunk: int) -> CommitRecord:
        record = self._job.ledger.read(chunk)
        if record is None:
            raise JobError(f"chunk {chunk} vanished from the ledger while it was read")
        return record

    def _wrong(self, path: str, detail: str) -> None:
        self._defects.append(Defect(kind="dataset-wrong", path=path, detail=detail))


def _row_defects(path: str, rows: list[dict[str, Any]], samples: list[PlannedSample]) -> Iterator[Defect]:
    """The rows are those of the plan: each sample once, in order, with the parameters that were asked for."""
    found, planned = [row["sample_id"] for row in rows], [sample.sample_id for sample in samples]
    if found != planned:
        repeated = sorted({sample for sample in found if found.count(sample) > 1})
        detail = f"sample {repeated[0]} is there more than once" if repeated else "its samples are not those planned"
        yield Defect(kind="row-wrong", path=path, detail=detail)
        return
    for row, sample in zip(rows, samples, strict=True):
        wrong = [name for name, value in _expected(sample).items() if row[name] != value]
        if wrong:
            detail = f"sample {sample.sample_id}: {', '.join(wrong)} not as the plan asked for"
            yield Defect(kind="row-wrong", path=path, detail=detail)


def _expected(sample: PlannedSample) -> dict[str, Any]:
    """What the plan fixes of a row, as the row's types store it."""
    request = sample.request
    return {
        "row_id": sample.row_id,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": float(np.float32(request.guidance_scale)),
        "sampler": request.sampler,
        "eta": float(np.float32(request.eta)),
    }
