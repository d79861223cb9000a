"""The manifest as the job keeps it: immutable Parquet parts of valid rows, with a digest of their values."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.columns import row_bytes, schema_digest, update_digest
from latentmill.jobs.manifests.fields import Value
from latentmill.jobs.manifests.validate import Reject
from latentmill.jobs.plans.grid import MAX_GROUPS, PartRows
from latentmill.jobs.plans.row_classes import RowClass, images_per_row, row_classes
from latentmill.jobs.store.parquet import OversizeError, read_parquet

PART_ROWS = 50_000
PART_BYTES = 64 << 20
MAX_RECORDED_REJECTS = 100_000
_CACHED_PARTS = 3
_MAX_PART_BYTES = 4 * PART_BYTES
"""In memory, including the row that filled the part and Arrow's overhead."""

REJECT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("row_number", pa.int64()),
        pa.field("row_id", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("excerpt", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartInfo:
    """One part: its number of rows and a digest of their values, independent of how Parquet stores them."""

    rows: int
    digest: str


class SnapshotWriter:
    """Spools valid rows into parts in a local folder. Parts are cut by rows and bytes, independent of batches."""

    def __init__(
        self, folder: Path, schema: pa.Schema, *, class_fields: Sequence[str], defaults: Mapping[str, Value]
    ) -> None:
        self.parts: list[PartInfo] = []
        self.classes: dict[RowClass, int] = {}
        self.rows_without_seed = 0
        self._folder = folder
        self._schema = schema
        self._class_fields = class_fields
        self._defaults = defaults
        self._images: list[dict[int, int]] = []
        self._held: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows in order."""
        while len(batch):
            ends = self._bytes + np.cumsum(row_bytes(batch))
            take = min(PART_ROWS - self._rows, int(np.searchsorted(ends, PART_BYTES)) + 1, len(batch))
            self._held.append(batch.slice(0, take))
            self._rows += take
            self._bytes = int(ends[take - 1])
            batch = batch.slice(take)
            if self._rows == PART_ROWS or self._bytes >= PART_BYTES:
                self._cut()

    def close(self) -> str:
        """Write what is held and return the digest of all rows."""
        if self._rows:
            self._cut()
        whole = hashlib.sha256(schema_digest(self._schema).encode())
        for part in self.parts:
            whole.update(f"{part.rows}:{part.digest};".encode())
        return whole.hexdigest()

    def image_counts(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """`(parts, classes)`: images per combination of the axes."""
        counts = np.zeros((len(self.parts), len(self.classes)), dtype=np.int64)
        for part, by_class in enumerate(self._images):
            for row_class, images in by_class.items():
                counts[part, row_class] = images
        return counts

    def path(self, part: int) -> Path:
        """Where a part is spooled."""
        return self._folder / f"part-{part:05d}.parquet"

    def _cut(self) -> None:
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        self._count(table)
        try:
            pq.write_table(table, self.path(len(self.parts)), compression="zstd")
        except OSError as error:
            raise JobError(
                f"the manifest cannot be spooled to {self._folder}: {error.strerror or error}; "
                "set TMPDIR to a folder with more space"
            ) from error
        self.parts.append(PartInfo(rows=len(table), digest=part_digest(table)))
        self._held, self._rows, self._bytes = [], 0, 0

    def _count(self, table: pa.Table) -> None:
        classes = row_classes(table, self._class_fields, self._defaults)
        images = images_per_row(table, self._defaults)
        has_seed = "seed" in table.column_names
        self.rows_without_seed += table.column("seed").null_count if has_seed else len(table)
        counts: dict[int, int] = {}
        if (classes == classes[:1]).all():
            found, places = classes[:1], np.zeros(len(table), dtype=np.int64)
        else:
            found, places = np.unique(classes, axis=0, return_inverse=True)
        sums = np.bincount(places.ravel(), weights=images, minlength=len(found))
        for numbers, total in zip(found.tolist(), sums, strict=True):
            counts[self.classes.setdefault(tuple(numbers), len(self.classes))] = int(total)
        if len(self.classes) > MAX_GROUPS:
            raise UsageError(
                f"the manifest mixes more than {MAX_GROUPS:,} combinations of size, steps, sampler and guidance; "
                "use fewer, or split the manifest"
            )
        self._images.append(counts)


def part_digest(table: pa.Table) -> str:
    """A hash of the rows' values, column by column."""
    digest = hashlib.sha256()
    for column in table.columns:
        update_digest(digest, column.combine_chunks() if column.num_chunks != 1 else column.chunk(0))
    return digest.hexdigest()


class RejectWriter:
    """Spools rejects; beyond the first 100,000 they are only counted."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.first: list[tuple[str, Reject]] = []
        self.path = path
        self._writer = pq.ParquetWriter(path, REJECT_SCHEMA, compression="zstd")

    def add(self, source: str, rejects: Iterable[Reject]) -> None:
        """Append the rejects of one batch."""
        rows = []
        for reject in rejects:
            if len(self.first) < 10:
                self.first.append((source, reject))
            if self.count < MAX_RECORDED_REJECTS:
                rows.append(
                    {
                        "source": source,
                        "source_row": reject.line,
                        "row_number": reject.row_number,
                        "row_id": reject.row_id,
                        "reason": reject.reason,
                        "excerpt": reject.excerpt,
                    }
                )
            self.count += 1
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, REJECT_SCHEMA))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class SnapshotReader:
    """The parts of a plan; the last few stay in memory. Safe to use from several threads."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        parts: Sequence[PartInfo],
        schema: pa.Schema,
        *,
        class_fields: Sequence[str],
        defaults: Mapping[str, Value],
    ) -> None:
        self._read = read
        self._parts = parts
        self._schema = schema
        self._class_fields = class_fields
        self._defaults = defaults
        self._cache: OrderedDict[int, tuple[pa.Table, PartRows]] = OrderedDict()
        self._lock = threading.Lock()

    def part(self, index: int) -> tuple[pa.Table, PartRows]:
        """One part's rows. Raises JobError if they are not the planned rows."""
        with self._lock:
            if index not in self._cache:
                self._cache[index] = self._load(index)
                while len(self._cache) > _CACHED_PARTS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(index)
            return self._cache[index]

    def _load(self, index: int) -> tuple[pa.Table, PartRows]:
        try:
            table = read_parquet(self._read(index), max_rows=PART_ROWS, max_bytes=_MAX_PART_BYTES)
            table = table.replace_schema_metadata(None)
        except (pa.ArrowException, OSError, OversizeError) as error:
            raise JobError(
                f"manifest part {index} of the plan cannot be read: {error}; restore _job/ or start anew"
            ) from error
        if not table.schema.equals(self._schema) or part_digest(table) != self._parts[index].digest:
            raise JobError(f"manifest part {index} of the plan is not what was planned; restore _job/ or start anew")
        rows = PartRows(
            classes=row_classes(table, self._class_fields, self._defaults), images=images_per_row(table, self._defaults)
        )
        return table, rows
