"""Cells that another output already holds: found by what was asked for, checked, and taken as they are.

A donor's row with the same request and execution class has the picture that would be drawn here: to the bit on a CPU,
and on a GPU where its slot in the batch is the same. Nothing of a donor is believed that can be checked: a picture
counts only if it has its row's digests, and its file is written anew from its pixels, as this job would write it. Reuse
saves time and nothing else: whatever is wrong with a donor is told, and the cell is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.donors import nothing_from, request_columns, why_not
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.picture_store import Origin
from latentmill.jobs.ledger.pictures import decode_png, pixel_sha256
from latentmill.jobs.plans.columns import stored, values
from latentmill.jobs.plans.option_columns import SCALES
from latentmill.jobs.plans.plan import Plan, PlannedSample
from latentmill.jobs.postprocess import ProcessedSample, encode_picture
from latentmill.jobs.slots import slots_of

_TAKEN = (
    "status",
    "nsfw_score",
    "nsfw_checker",
    "watermark",
    "watermark_bit_accuracy",
    "image",
    "bytes",
    "sha256",
    "pixel_sha256",
    "prompt_tokens",
    "precision",
    "batch_size",
)
"""What a taken row keeps of the donor's; all else is this plan's."""
_OF_MODEL = ("model_sha256", "prediction_type", "timestep_spacing")
"""What must be the same of a row's model, wherever it lies."""
_THREADS = 16
_WINDOW = 64
_READING = 8
_NAME_SHOWN, _REASON_SHOWN = 200, 500
"""Characters of a donor's text in a note: it may be a stranger's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A row of a donor, as much of it as is taken."""

    donor: int
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TakenCells:
    """What could be taken for a chunk, by the row's place in it, and what should be told."""

    samples: Mapping[int, ProcessedSample]
    notes: tuple[str, ...]


NOTHING_TAKEN = TakenCells({}, ())


class CellIndex:
    """The cells of some donors that are by the plan's `model`, by what was asked for.

    Each donor's records are read once, when it is made.
    `execution_class` None takes cells of any: to count them before there is a device.
    """

    def __init__(self, plan: Plan, donors: Sequence[str], execution_class: str | None) -> None:
        self._plan = plan
        self._execution_class = execution_class
        self._columns = request_columns(plan)
        self._options = [SCALES] if plan.model.loras else []
        self._jobs: list[Job | None] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._tables: list[pa.Table] = []
        self._notes: list[str] = []
        self.execution_classes: set[str] = set()
        for url in donors:
            self._add(url)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def urls(self) -> list[str]:
        """The donors that may have something, as they are shown; empty for the others."""
        return ["" if job is None else job.storage.url for job in self._jobs]

    def notes(self) -> tuple[str, ...]:
        """What should be told since the last call."""
        notes, self._notes = tuple(self._notes), []
        return notes

    def find(self, sample: PlannedSample) -> Cell | None:
        """The first donor's row of the same request, if there is one."""
        asked = values(self._columns, "sample", sample)
        request = tuple(stored(column, asked[column.name]) for column in self._columns)
        place = self._places.get(_digest((*request, *(sample.extra[name] for name in self._options))))
        if place is None or self._jobs[place[0]] is None:
            return None
        return Cell(donor=place[0], row=self._tables[place[0]].slice(place[1], 1).to_pylist()[0])

    def take(self, samples: Sequence[PlannedSample]) -> TakenCells:
        """The samples of a chunk that donors have, read and checked, several at a time."""
        found = {row: cell for row, sample in enumerate(samples) if (cell := self.find(sample)) is not None}
        if not found:
            return TakenCells({}, self.notes())
        slots = slots_of([sample.request for sample in samples], self._plan.batch_size)
        with ThreadPoolExecutor(_READING) as pool:
            taken = pool.map(lambda row: self._take(samples[row], found[row], slots[row]), found)
            read = {row: sample for row, sample in zip(found, taken, strict=True) if sample is not None}
        return TakenCells(read, self.notes())

    def _add(self, url: str) -> None:
        self._jobs.append(None)
        try:
            job = open_job(url)
            reason = why_not(self._plan, job.plan)
            if reason is None:
                self._jobs[-1] = job
                self._read(job, len(self._jobs) - 1)
            elif len(self._plan.models) > 1:
                reason = None  # it has another of our models: which have none was told when donors were found
        except JobError as error:
            self._jobs[-1], reason = None, str(error)
        if reason is not None:
            self._notes.append(nothing_from(url, reason))
        while len(self._tables) < len(self._jobs):
            self._tables.append(pa.table({}))

    def _read(self, job: Job, donor: int) -> None:
        """Every committed row that has a picture of our execution class."""
        tables, rows, others, places = [], 0, set[str](), dict[bytes, tuple[int, int]]()
        model = values(self._plan.columns, "job", self._plan)
        lacking = {column.name for column in self._columns} - {column.name for column in job.plan.columns}
        for record in self._records(job):
            usable = pc.is_valid(record.column("image"))
            for name in _OF_MODEL if len(job.plan.models) > 1 else ():
                usable = pc.and_(usable, pc.equal(record.column(name), model[name]).fill_null(fill_value=False))
            if self._execution_class is not None:
                same = pc.equal(record.column("execution_class"), self._execution_class)
                others |= set(record.filter(pc.and_(usable, pc.invert(same))).column("execution_class").to_pylist())
                usable = pc.and_(usable, same)
            table = record.filter(usable)
            self.execution_classes |= set(table.column("execution_class").drop_null().to_pylist())
            names = [*(column.name for column in self._columns), *self._options]
            asked = [
                # an output without images may have a column of that name that it carries along
                [None] * table.num_rows if name in lacking else table.column(name).to_pylist()
                for name in names
            ]
            for number, request in enumerate(zip(*asked, strict=True)):
                places.setdefault(_digest(request), (donor, rows + number))
            rows += table.num_rows
            tables.append(table.select(_TAKEN))
        self._tables.append(pa.concat_tables(tables).combine_chunks() if tables else pa.table({}))
        self._places = places | self._places
        if others:
            self._notes.append(
                f"{job.storage.url} has cells of another execution class, which are drawn anew: {sorted(others)[0]} "
                f"there, {self._execution_class} here"
            )

    def _records(self, job: Job) -> Iterator[pa.Table]:
        """The effective rows of each committed chunk, read several at a time; a damaged record is told and left out."""
        listing = job.ledger.listing()
        chunks: list[int] = np.flatnonzero(listing.committed).tolist()

        def read(chunk: int) -> pa.Table | str | None:
            try:
                record = job.ledger.effective(chunk, listing.repairs.get(chunk, 0))
            except JobError as error:
                return str(error)
            return None if record is None else record.table

        damaged: list[str] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(chunks), _WINDOW):
                for found in pool.map(read, chunks[start : start + _WINDOW]):
                    if isinstance(found, str):
                        damaged.append(found)
                    elif found is not None:
                        yield found
        if damaged:
            self._notes.append(
                f"{len(damaged):,} records of {job.storage.url} cannot be read, and their cells are drawn anew: "
                f"{damaged[0]}"
            )

    def _take(self, sample: PlannedSample, cell: Cell, slot: int) -> ProcessedSample | None:
        """The cell as a sample of this plan; None, and a note, if its picture is not what its row says."""
        job, row, plan = self._jobs[cell.donor], cell.row, self._plan
        if job is None:
            return None
        try:
            data = job.pictures.read_row(row)
            pixels = decode_png(data, (sample.request.width, sample.request.height))
            if pixel_sha256(pixels) != row["pixel_sha256"]:
                raise ValueError("its pixels are not those of its row")
        except (ValueError, JobError) as error:
            self._notes.append(_drawn_anew(job, row, str(error)))
            if getattr(error, "transient", False):
                self._jobs[cell.donor] = None  # its store does not answer: nothing more is asked of it
            return None
        file = encode_picture(pixels, sample.request, plan.model, plan.versions["latentmill"], plan.format_version)
        mine = {
            "execution_class": self._execution_class,
            "batch_slot": slot,
            "reused_from": f"{job.storage.url}/{row['image']}",
        }
        taken = {name: row[name] for name in _TAKEN if name not in {"image", "bytes", "sha256"}}
        base = dict.fromkeys(plan.record_schema.names) | sample.extra
        base |= values(plan.columns, "sample", sample) | plan.constants_of(sample.model)
        made = base | taken | mine
        fault = next((fault for rule in self._rules() if (fault := rule(made | {"image": ""}, plan)) is not None), None)
        if fault is not None:
            self._notes.append(_drawn_anew(job, row, fault))
            return None
        origin = Origin(job.storage, row["image"]) if file == data else None
        return ProcessedSample(row=made, data=file, origin=origin)

    def _rules(self) -> list[Any]:
        return [column.rule for column in self._plan.columns if column.rule is not None]


def _digest(request: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(repr(request).encode(), digest_size=16).digest()


def _drawn_anew(job: Job, row: Mapping[str, Any], reason: str) -> str:
    return f"{row['image'][:_NAME_SHOWN]} of {job.storage.url} is drawn anew: {reason[:_REASON_SHOWN]}"
