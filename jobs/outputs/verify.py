"""Read everything again and say what is not as it was written."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.ledger import chunk_of_path, repair_of_path
from latentmill.jobs.ledger.records import CommitRecord
from latentmill.jobs.outputs.captions import CaptionShelf, Fetch
from latentmill.jobs.outputs.chunk_check import ChunkCheck, ChunkFindings
from latentmill.jobs.outputs.defects import Defect, Kind, lasting
from latentmill.jobs.outputs.merge import merged_tables
from latentmill.jobs.outputs.publish import (
    MANIFEST_PATH,
    MAX_PART_BYTES,
    PART_NAME,
    ROWS_PER_PART,
    Part,
    Publication,
    load_publication,
    manifest_path,
)
from latentmill.jobs.outputs.redraw import Drawing, Redrawer, Regenerated
from latentmill.jobs.outputs.rows import draw_samples, rows_of
from latentmill.jobs.outputs.score_check import score_defects
from latentmill.jobs.store.parquet import OversizeError, read_parquet

Phase = Literal["checking", "comparing", "drawing", "healing"]
DEFAULT_SEED = 42
"""What draws the samples that are made again, unless another one is given."""
_THREADS = 8
_MAX_DEFECTS = 10_000
_SLACK_BYTES = 64 << 20
UNSOUND: frozenset[Kind] = frozenset(["chunk-missing", "record-damaged", "repair-wrong", "row-wrong"])
"""Defects of the ledger: with one of them, it does not say what the dataset should be."""


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
    repairs: int
    """Repair records, which `run --retry-failed` made; the rows include them."""
    superseded_parts: int
    """Whole parts of a publication with other repairs: no defect, `clean` removes them when they are a day old."""
    defects: tuple[Defect, ...]
    regenerated: tuple[Regenerated, ...] = ()
    """Samples that were drawn, made again and compared."""
    regenerate_seed: int | None = None
    """What they were drawn by."""

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong."""
        return 1 if self.defects else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": self.exit_code}


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyProgress:
    """How far it is: chunks while `checking` records and pictures, dataset parts while `comparing`, samples while
    `drawing` them again.

    `repair` goes on with pictures while `healing`.
    """

    phase: Phase
    done: int
    total: int
    images: int
    bytes: int
    defects: int


def verify(
    out_url: str,
    *,
    sample_n: int | None = None,
    regenerate_n: int = 0,
    regenerate_seed: int = DEFAULT_SEED,
    drawing: Drawing | None = None,
    on_progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> VerifyReport:
    """Checks the ledger against the plan, every picture against its row, the published dataset against the ledger, and
    scores against the dataset.

    `sample_n` reads only that many pictures, chosen at random; records and dataset are always read whole. So many
    samples as `regenerate_n` says, chosen by its seed, are made again from their rows. Repairs that are made meanwhile
    are not looked at. Raises UsageError if the output has no plan.
    """
    checker = _Checker(open_job(out_url), sample_n, on_progress)
    checker.check_chunks()
    checker.check_strays()
    checker.check_dataset()
    checker.check_scores()
    if regenerate_n:
        checker.check_regenerated(regenerate_n, regenerate_seed, drawing or Drawing())
    return checker.report()


class _Checker:
    def __init__(self, job: Job, sample_n: int | None, on_progress: Callable[[VerifyProgress], None]) -> None:
        self._job = job
        self._manifest = manifest_path(job.plan)
        self._on_progress = on_progress
        self._publication = load_publication(job)  # before the listing, which therefore has all that it includes
        self._listing = job.ledger.listing()
        self._superseded = 0
        self._total = ChunkFindings()
        self._defects: list[Defect] = []
        self._parts = 0
        self._regenerated: dict[int, Regenerated] = {}
        self._regenerate_seed: int | None = None
        chosen = None
        if sample_n is not None and sample_n < job.plan.n_samples:
            chosen = frozenset(random.sample(range(job.plan.n_samples), sample_n))
        self._chunks = ChunkCheck(job, self._listing, chosen)

    def report(self) -> VerifyReport:
        return VerifyReport(
            out=self._job.storage.url,
            plan_hash=self._job.plan.plan_hash,
            chunks=self._job.plan.n_chunks,
            rows=self._total.rows,
            images_checked=self._total.images,
            bytes_read=self._total.bytes,
            parts_checked=self._parts,
            repairs=self._listing.n_repairs,
            superseded_parts=self._superseded,
            defects=tuple(sorted(self._defects, key=lambda defect: (defect.kind, defect.path, defect.detail))),
            regenerated=tuple(self._regenerated[sample] for sample in sorted(self._regenerated)),
            regenerate_seed=self._regenerate_seed,
        )

    def check_chunks(self) -> None:
        """Every chunk of the plan, several at a time, with a bounded number under way."""
        chunks, done = iter(range(self._job.plan.n_chunks)), 0
        self._show("checking", 0, self._job.plan.n_chunks)
        running: set[Future[ChunkFindings]] = set()
        with ThreadPoolExecutor(_THREADS) as pool:
            while True:
                while len(running) < 2 * _THREADS and (chunk := next(chunks, None)) is not None:
                    running.add(pool.submit(self._chunks.findings, chunk))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._add(future.result())
                done += len(finished)
                self._show("checking", done, self._job.plan.n_chunks)

    def _show(self, phase: Phase, done: int, total: int) -> None:
        self._on_progress(
            VerifyProgress(
                phase=phase,
                done=done,
                total=total,
                images=self._total.images,
                bytes=self._total.bytes,
                defects=len(self._defects),
            )
        )

    def _add(self, findings: ChunkFindings) -> None:
        self._total.rows += findings.rows
        self._total.images += findings.images
        self._total.bytes += findings.bytes
        self._defects.extend(findings.defects[: _MAX_DEFECTS - len(self._defects)])

    def check_strays(self) -> None:
        """Nothing lies in the ledger but the records of the plan's chunks, and repairs of chunks that are committed."""
        suspects: list[tuple[int, str]] = []
        for path, _ in self._job.storage.list("ledger"):
            chunk, repair = chunk_of_path(path), repair_of_path(path)
            if repair is not None and repair[0] < self._job.plan.n_chunks:
                if not self._listing.committed[repair[0]]:
                    suspects.append((repair[0], path))
            elif chunk is None or chunk >= self._job.plan.n_chunks:
                self._defects.append(Defect(kind="record-stray", path=path, detail="the plan has no such chunk"))
        committed = self._job.ledger.committed() if suspects else self._listing.committed  # it may be a new one
        for chunk, path in suspects:
            if not committed[chunk]:
                detail = f"chunk {chunk}, which it repairs, is not committed"
                self._defects.append(Defect(kind="record-stray", path=path, detail=detail))

    def check_dataset(self) -> None:
        """The published parts hold exactly the ledger's rows, in order."""
        publication = self._publication
        if publication is None:
            self._defects.append(
                Defect(kind="not-published", path=self._manifest, detail="it is absent, damaged or another plan's")
            )
            return
        known = {part.path for part in publication.parts} | {self._manifest}
        for path, _ in self._job.storage.list("dataset"):
            if path not in known:
                self._check_unnamed(path, publication)
        if publication.repairs < self._listing.n_repairs:
            detail = (
                f"it includes {publication.repairs} repair records of {self._listing.n_repairs}; run the same command "
                f"again to publish them"
            )
            self._defects.append(Defect(kind="publication-stale", path=self._manifest, detail=detail))
        elif publication.repairs > self._listing.n_repairs:
            self._wrong(
                self._manifest,
                f"it includes {publication.repairs} repair records, the ledger has {self._listing.n_repairs}; restore "
                f"the ledger from a copy",
            )
        elif not any(defect.kind in UNSOUND for defect in self._defects):
            self._compare_parts(publication)
            return
        for part in publication.parts:
            self._read_part(part)  # without its own ledger the parts can only be held against their digests

    def check_scores(self) -> None:
        """The scores beside the dataset are of its rows."""
        if self._publication is not None:
            try:
                self._defects.extend(score_defects(self._job, self._publication))
            except (FileNotFoundError, JobError) as error:
                lasting(error)  # what is wrong with the published parts themselves is told already

    def check_regenerated(self, count: int, seed: int, drawing: Drawing) -> None:
        """Samples that a seed draws from what is published come out again as they are."""
        self._regenerate_seed = seed
        try:
            rows = rows_of(self._job, draw_samples(self._job, count, seed))
        except JobError as error:
            self._defects.append(Defect(kind="not-reproduced", path=self._manifest, detail=str(error)))
            return
        self._show("drawing", 0, len(rows))
        for sample, again in Redrawer(self._job, drawing).samples(rows):
            self._regenerated[sample] = again
            if not again.good:
                detail = f"sample {again.sample_id} made again: {again.words}"
                path = again.image or self._manifest
                self._defects.append(Defect(kind="not-reproduced", path=path, detail=detail))
            self._show("drawing", len(self._regenerated), len(rows))

    def _check_unnamed(self, path: str, publication: Publication) -> None:
        """A part that no manifest names: where there are repairs, it may be of the publication before or to come."""
        place = PART_NAME.fullmatch(path)
        if place is not None and (publication.repairs or self._listing.repairs):
            try:
                if hashlib.sha256(self._job.storage.read(path, MAX_PART_BYTES)).hexdigest().startswith(place[1]):
                    self._superseded += 1
                    return
            except FileNotFoundError:
                return  # `clean` was faster
            except JobError as error:
                self._defects.append(Defect(kind="part-stray", path=path, detail=lasting(error)))
                return
        self._defects.append(Defect(kind="part-stray", path=path, detail="the manifest does not name it"))

    def _compare_parts(self, publication: Publication) -> None:
        rows_per_part = publication.parts[0].rows if publication.parts else ROWS_PER_PART
        named = {part.path: part for part in publication.captions}
        fetch: Fetch = self._fetch
        if self._manifest == MANIFEST_PATH:

            def compare(path: str, expected: pa.Table) -> None:
                self._compare_captions(path, named.pop(path, None), expected)

            fetch = CaptionShelf(self._job.plan.n_chunks, compare).watching(fetch)
        tables = merged_tables(self._job, fetch, rows_per_part)
        for number, (part, expected) in enumerate(zip(publication.parts, tables, strict=False)):
            self._show("comparing", number, len(publication.parts))
            data = self._read_part(part)
            if data is not None and not _holds(data, expected):
                self._wrong(part.path, "its rows are not those of the ledger")
        self._show("comparing", len(publication.parts), len(publication.parts))
        for path in named:
            self._wrong(self._manifest, f"it names {path}, which no picture of the ledger needs")
        total = sum(part.rows for part in publication.parts)
        if total != self._job.plan.n_samples or publication.rows != total or sum(publication.counts.values()) != total:
            self._wrong(self._manifest, f"its totals do not add up to {self._job.plan.n_samples} samples")

    def _compare_captions(self, path: str, named: Part | None, expected: pa.Table) -> None:
        if named is None:
            self._wrong(self._manifest, f"it does not name {path}")
            return
        data = self._read_named(named, "captions-damaged")
        if data is not None and not _holds(data, expected):
            self._wrong(path, "its rows are not those of the ledger")

    def _read_part(self, part: Part) -> bytes | None:
        self._parts += 1
        return self._read_named(part, "part-damaged")

    def _read_named(self, part: Part, kind: Kind) -> bytes | None:
        """The bytes of a file whose digest the manifest has; None, and a defect of that kind, if it is not it."""
        try:
            data = self._job.storage.read(part.path, part.bytes)
        except (FileNotFoundError, JobError) as error:
            self._defects.append(Defect(kind=kind, path=part.path, detail=f"not readable: {lasting(error)}"))
            return None
        self._total.bytes += len(data)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            detail = f"{len(data)} bytes that do not match the digest in {self._manifest}"
            self._defects.append(Defect(kind=kind, path=part.path, detail=detail))
            return None
        return data

    def _fetch(self, chunk: int) -> CommitRecord:
        record = self._job.ledger.effective(chunk, self._listing.repairs.get(chunk, 0))
        if record is None:
            raise JobError(f"chunk {chunk} vanished from the ledger while it was read")
        return record

    def _wrong(self, path: str, detail: str) -> None:
        self._defects.append(Defect(kind="dataset-wrong", path=path, detail=detail))


def _holds(data: bytes, expected: pa.Table) -> bool:
    """Whether a part has these rows. One that would unpack to far more than they take has not."""
    try:
        table = read_parquet(data, max_rows=expected.num_rows, max_bytes=2 * expected.nbytes + _SLACK_BYTES)
    except (pa.ArrowException, OSError, OversizeError):
        return False
    return bool(table.equals(expected))
