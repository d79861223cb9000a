"""The gallery of an output: rows as data of a page, pictures as thumbnails. Writing it again costs what is new.

`OUT/report/index.html` is the page. Its rows lie in files of some thousand, what is seen of one picture only (digests,
paths, long texts) in smaller ones, which the page loads when it is asked. Thumbnails have the plan and the sample in
their names: a sample of a plan never gets another picture, so one that is there is done.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.errors import JobError
from latentmill.jobs.exports.rows import Source
from latentmill.jobs.job import Job
from latentmill.jobs.manifests.axes import models_of
from latentmill.jobs.manifests.fields import MODEL
from latentmill.jobs.manifests.loras import lora_of_axis
from latentmill.jobs.manifests.replacements import replaced_by
from latentmill.jobs.plans.columns import COLUMNS, STATUSES
from latentmill.jobs.plans.option_columns import SCALES
from latentmill.jobs.plans.planned import Plan
from latentmill.jobs.show.page import MAX_TEXT, PageFolder, encode_columns, thumbnail
from latentmill.jobs.store.errors import StorageError

REPORT_PREFIX = "report"
BLOCK_ROWS = 5000
"""Rows of a file that the page loads at once."""
DETAIL_ROWS = 250
"""Rows of a file that it loads when one of them is looked at."""

_FILES = ("gallery.css", "columns.js", "view.js", "lightbox.js", "gallery.js")
_DETAILS = ("sha256", "pixel_sha256", "image", "bytes")
_NO_PICTURE, _SHOWN, _HIDDEN, _UNREADABLE = range(4)
"""What the page knows of a row's picture. A hidden one was flagged and kept: it is shown when it is asked for."""
_PICTURE = r"^images/\d{5,}/[0-9a-z-]+/\d{8,}\.png$"
_THREADS_PER_CORE = 4
_READ_THREADS = 16

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GallerySummary:
    """The page, and what is on it. `thumbnails` were made now; those of an earlier report are not made again."""

    page: str
    state: str
    rows: int
    samples: int
    thumbnails: int
    unreadable: int


class Rows(Protocol):
    """Where rows come from. Block n has the samples from n * BLOCK_ROWS on, in order, as far as they are there."""

    state: str

    def refresh(self) -> Collection[int]:
        """The blocks that have other rows than at the last call."""
        ...

    def block(self, number: int) -> tuple[list[int], pa.Table]:
        """The numbers of its samples, and their rows."""
        ...


class PublishedRows:
    """The rows of a published dataset with their scores, a part in memory at a time."""

    state = "published"

    def __init__(self, source: Source, limit: int) -> None:
        self._source = source
        self._rows = min(limit, source.publication.rows)

    def refresh(self) -> Collection[int]:
        return range((self._rows + BLOCK_ROWS - 1) // BLOCK_ROWS)

    def block(self, number: int) -> tuple[list[int], pa.Table]:
        start, stop = number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, self._rows)
        return list(range(start, stop)), pa.concat_tables([table for _, table in self._source.tables(start, stop)])


class CommittedRows:
    """The rows that the ledger has so far, all in memory; each record is read once, and again when it is repaired."""

    state = "running"

    def __init__(self, job: Job, limit: int) -> None:
        self._job = job
        self._limit = min(limit, job.plan.n_samples)
        self._read: dict[int, int] = {}
        self._tables: dict[int, dict[int, tuple[list[int], pa.Table]]] = {}

    def refresh(self) -> Collection[int]:
        listing = self._job.ledger.listing()
        repairs = {chunk: listing.repairs.get(chunk, 0) for chunk in np.flatnonzero(listing.committed).tolist()}
        new = [chunk for chunk, number in repairs.items() if self._read.get(chunk) != number]
        changed: set[int] = set()
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            records = pool.map(self._job.ledger.effective, new, [repairs[chunk] for chunk in new])
            for chunk, record in zip(new, records, strict=True):
                if record is None:
                    raise JobError(f"a commit record vanished from {self._job.storage.url} while it was read")
                changed |= self._take(chunk, record.table)
                self._read[chunk] = repairs[chunk]
        return sorted(changed)

    def _take(self, chunk: int, table: pa.Table) -> set[int]:
        numbers = np.asarray(pc.cast(table.column("sample_id"), pa.int64()))
        blocks = numbers // BLOCK_ROWS
        found = set()
        for block in np.unique(blocks[(numbers >= 0) & (numbers < self._limit)]).tolist():
            places = np.flatnonzero((blocks == block) & (numbers < self._limit))
            self._tables.setdefault(block, {})[chunk] = (numbers[places].tolist(), table.take(pa.array(places)))
            found.add(block)
        return found

    def block(self, number: int) -> tuple[list[int], pa.Table]:
        pieces = self._tables[number].values()
        numbers = [n for some, _ in pieces for n in some]
        order = np.argsort(numbers, kind="stable")
        table = pa.concat_tables([table for _, table in pieces])
        return [numbers[place] for place in order], table.take(pa.array(order))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """What the page is told of a block."""

    rows: str
    details: tuple[str, ...]
    n: int
    counts: Mapping[str, int]
    unreadable: int


@dataclass(kw_only=True)
class Gallery:
    """The gallery of one output. `side` is the longest side of a thumbnail in pixels."""

    job: Job
    side: int
    limit: int
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _state: str = ""

    def __post_init__(self) -> None:
        self._page = PageFolder(self.job.storage, REPORT_PREFIX)
        self._models = _model_names(self.job.plan)
        self._digits = max(8, len(str(self.job.plan.n_samples - 1)))
        self._thumbs = f"thumbs/{self.side}-{self.job.plan.plan_hash[:8]}"
        found = (path for path, _ in self.job.storage.list(f"{REPORT_PREFIX}/{self._thumbs}"))
        stems = (path.rpartition("/")[2].removesuffix(".webp") for path in found if path.endswith(".webp"))
        self._made = {int(stem) for stem in stems if re.fullmatch(r"\d{8,19}", stem, re.ASCII)}

    def write(self, rows: Rows, *, live: bool, on_pictures: Advance = lambda _done: None) -> GallerySummary:
        """Afterwards the page shows these rows as they are now. With `live` it looks for newer ones while it is open.

        `on_pictures` is told how many pictures more are done.
        """
        before = len(self._made)
        changed = rows.refresh()
        for number in changed:
            self._blocks[number] = self._write_block(*rows.block(number), on_pictures)
        if not self._state:
            self._page.write_page("index.html", _FILES)
        self._state = rows.state
        self._publish(live=live)
        return GallerySummary(
            page=f"{REPORT_PREFIX}/index.html",
            state=rows.state,
            rows=sum(block.n for block in self._blocks.values()),
            samples=self.job.plan.n_samples,
            thumbnails=len(self._made) - before,
            unreadable=sum(block.unreadable for block in self._blocks.values()),
        )

    def end(self) -> None:
        """Afterwards the page no longer looks for newer rows."""
        self._publish(live=False)

    def _publish(self, *, live: bool) -> None:
        for block in self._blocks.values():
            for place in (block.rows, *block.details):
                self._page.keep(place)
        self._page.publish(self._meta(live=live))

    def _write_block(self, numbers: Sequence[int], table: pa.Table, advance: Advance) -> _Block:
        pictures = self._make_thumbnails(numbers, table, advance)
        images = table.column("image")
        named = pc.if_else(pc.match_substring_regex(images, _PICTURE), images, pa.scalar(None, pa.string()))
        table = table.set_column(table.schema.get_field_index("image"), "image", named)
        shown = table.drop_columns(["sample_id", *_DETAILS])
        if self._models:
            names = [self._models.get(source, source) for source in table.column(MODEL).to_pylist()]
            shown = shown.set_column(shown.schema.get_field_index(MODEL), MODEL, pa.array(names, pa.string()))
        self._names = shown.column_names
        rows = {"numbers": list(numbers), "pictures": pictures, "columns": encode_columns(shown)}
        first = numbers[0]
        details = [
            self._page.add(f"details-{first // BLOCK_ROWS:05d}", {"columns": encode_columns(part, whole=True)})
            for part in _detail_parts(table, [MODEL] if self._models else [])
        ]
        statuses = table.column("status").to_pylist()
        return _Block(
            rows=self._page.add(f"rows-{first // BLOCK_ROWS:05d}", rows),
            details=tuple(details),
            n=len(numbers),
            counts={status: statuses.count(status) for status in STATUSES},
            unreadable=pictures.count(_UNREADABLE),
        )

    def _make_thumbnails(self, numbers: Sequence[int], table: pa.Table, advance: Advance) -> list[int]:
        """Afterwards each picture that may be shown has a thumbnail. Returns what the page knows of each."""
        names = ["status", "image", "bytes", "sha256", "width", "height"]
        rows = table.select([*names, *({"on_flagged"} & set(table.column_names))]).to_pylist()

        def make(number: int, row: Mapping[str, Any]) -> int:
            if row["image"] is None or row["status"] != "ok":
                kept = row["image"] is not None and row.get("on_flagged", self.job.plan.settings.on_flagged) == "keep"
                return _HIDDEN if kept else _NO_PICTURE
            if number in self._made:
                return _SHOWN
            picture = self._read(row)
            if picture is None:
                return _UNREADABLE
            self.job.storage.write(f"{REPORT_PREFIX}/{self._thumbs}/{self._name(number)}", picture)
            self._made.add(number)
            return _SHOWN

        found = []
        with ThreadPoolExecutor(_THREADS_PER_CORE * (os.cpu_count() or 1)) as pool:
            for known in pool.map(make, numbers, rows):
                found.append(known)
                advance(1)
        return found

    def _read(self, row: Mapping[str, Any]) -> bytes | None:
        """The thumbnail of a row's picture; None if that is lost or not as it was written."""
        try:
            return thumbnail(self.job.pictures.read_row(row), self.side, (row["width"], row["height"]))
        except ValueError:
            return None
        except StorageError as error:
            if error.transient:
                raise
            return None  # for example, a folder has its name

    def _name(self, number: int) -> str:
        """As view.js puts it together."""
        return f"{number // 1000:05d}/{number:0{self._digits}d}.webp"

    def _meta(self, *, live: bool) -> dict[str, Any]:
        plan = self.job.plan
        texts = {column.name: column.text for column in COLUMNS}
        blocks = [self._blocks[number] for number in sorted(self._blocks)]
        return {
            "title": plan.settings.out.rstrip("/").rpartition("/")[2] or "latentmill",
            "state": self._state,
            "live": live,
            "updated": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "samples": plan.n_samples,
            "limit": self.limit,
            "counts": {status: sum(block.counts[status] for block in blocks) for status in STATUSES},
            "digits": self._digits,
            "thumbs": self._thumbs,
            "side": self.side,
            "detailRows": DETAIL_ROWS,
            "columns": [{"name": name, "text": texts.get(name, "")} for name in self._names],
            "details": list(_DETAILS),
            "axes": _axes(plan, self._models),
            "command": f"latentmill regenerate {shlex.quote(self.job.storage.url)} --sample",
            "blocks": [{"rows": block.rows, "details": block.details, "n": block.n} for block in blocks],
        }


def _model_names(plan: Plan) -> dict[str, str]:
    """What the models are called on the page, by their places; nothing for one alone, or where names are the same."""
    names = {model.source: model.name for model in plan.models}
    return names if 1 < len(names) == len(set(names.values())) else {}


def _axes(plan: Plan, models: Mapping[str, str]) -> list[dict[str, Any]]:
    """The columns in which a sweep's dimensions are seen, each with the order of its values where the plan has one.

    Of axes that vary together the one with most values stands for all, the first of several. A text that is replaced is
    seen in the column that it is in, and a LoRA's scale in that of all of them.
    """
    found: dict[str, list[Any]] = {}
    for dimension in plan.grid.dimensions:
        axis = max(dimension, key=lambda axis: len(set(axis.values)))
        if len(axis.values) < 2:
            continue
        replaced = (SCALES,) if lora_of_axis(axis.name) is not None else replaced_by(axis.name)
        values = list(dict.fromkeys(axis.values)) if replaced is None else []
        if axis.name == MODEL:
            named = models_of(plan.axes)
            places = [plan.models[named.index(str(value))].source for value in values]
            values = [models.get(place, place) for place in places]
        found.setdefault(axis.name if replaced is None else replaced[0], values)
    return [{"name": name, "values": values} for name, values in found.items()]


def _detail_parts(table: pa.Table, shortened: Sequence[str]) -> Iterator[pa.Table]:
    """What the files of details hold: their own columns, and those in which a text was cut for the page or replaced."""
    for start in range(0, table.num_rows, DETAIL_ROWS):
        part = table.slice(start, DETAIL_ROWS)
        whole = [name for name in part.column_names if name in shortened or _may_be_cut(part.column(name))]
        yield part.select([*_DETAILS, *whole])


def _may_be_cut(column: pa.ChunkedArray) -> bool:
    if pa.types.is_string(column.type):
        return bool((pc.max(pc.utf8_length(column)).as_py() or 0) > MAX_TEXT)
    kinds = (pa.types.is_nested, pa.types.is_binary, pa.types.is_large_string)
    return any(is_kind(column.type) for is_kind in kinds)
