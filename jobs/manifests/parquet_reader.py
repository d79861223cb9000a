"""Parquet manifests, decoded in small steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.aliases import read_names
from latentmill.jobs.manifests.columns import can_carry, plain_type, row_bytes, to_plain
from latentmill.jobs.manifests.fields import FIELDS, shorten
from latentmill.jobs.manifests.readers import (
    BATCH_BYTES,
    BATCH_ROWS,
    BLOCK_BYTES,
    MAX_ROW_BYTES,
    Layout,
    ManifestFile,
    Reader,
    RowBatch,
    refuse_wide,
)

READ_ROWS = 64
"""Rows decoded at once: a hostile file of a few hundred bytes can hold 1 MiB per row."""

MAX_CHUNK_BYTES = 512 << 20
MAX_EXPANSION = 100


class ParquetReader(Reader):
    """A few rows are decoded at a time, because a tiny file can decode to gigabytes."""

    def scan(self, file: ManifestFile) -> Layout:
        """The columns of the file's schema. Raises UsageError if a parameter's column has an unsuitable type."""
        with file.open() as stream, pq.ParquetFile(stream) as parquet:
            refuse_wide(len(parquet.schema_arrow.names))
            schema = _renamed(parquet.schema_arrow, accept=file.accept_aliases)
        names = schema.names
        for entry in schema:
            _refuse_type(entry)
            if not can_carry(plain_type(entry.type)):
                raise UsageError(
                    f"has the column {shorten(entry.name)} as {entry.type}, which cannot be carried; make it text"
                )
        return Layout(
            own=tuple(name for name in FIELDS if name in names),
            carried=tuple(pa.field(entry.name, plain_type(entry.type)) for entry in schema if entry.name not in FIELDS),
        )

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:
        """A row for each row; one over the limit is a fault, and its values are dropped."""
        columns = [*layout.own, *(entry.name for entry in layout.carried)]
        with file.open() as stream, pq.ParquetFile(stream, pre_buffer=False, buffer_size=BLOCK_BYTES) as parquet:
            names = parquet.schema_arrow.names
            written = dict(zip(read_names(names, accept=file.accept_aliases), names, strict=True))
            read_by = {column: name for name, column in written.items()}
            wanted = [written[name] for name in columns]
            _refuse_bombs(parquet.metadata, set(wanted))
            held: list[pa.RecordBatch] = []
            faults: dict[int, str] = {}
            start, rows, size = 1, 0, 0
            for piece in parquet.iter_batches(READ_ROWS, columns=wanted, use_threads=False):
                small = _drop_huge(piece.rename_columns([read_by[name] for name in piece.schema.names]), rows, faults)
                held.append(small)
                rows += len(small)
                size += small.nbytes
                if rows >= BATCH_ROWS or size > BATCH_BYTES:
                    yield _parquet_batch(held, faults, start)
                    start, rows, size, held, faults = start + rows, 0, 0, [], {}
            if held:
                yield _parquet_batch(held, faults, start)

    def looks_like(self, start: bytes) -> bool:
        """The magic number of Parquet."""
        return start.startswith(b"PAR1")


def _renamed(schema: pa.Schema, *, accept: bool) -> pa.Schema:
    names = read_names(schema.names, accept=accept)
    return pa.schema([entry.with_name(name) for name, entry in zip(names, schema, strict=True)])


def _refuse_type(entry: pa.Field) -> None:
    type_, known = plain_type(entry.type), FIELDS.get(entry.name)
    if known is None:
        return
    is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_)
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    fits = is_number if known.kind in {"int", "float"} else is_text or (entry.name == "id" and is_number)
    if not fits and not pa.types.is_null(type_):
        expected = "numbers" if known.kind in {"int", "float"} else "text"
        raise UsageError(f"has the column {entry.name} as {entry.type}, expected {expected}; convert the column")


def _refuse_bombs(metadata: Any, columns: set[str]) -> None:
    """A page is always decompressed whole, so refuse chunks that are huge and expand beyond any honest ratio."""
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            expanded, packed = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
            if (
                chunk.path_in_schema.split(".")[0] in columns
                and expanded > MAX_CHUNK_BYTES
                and expanded > MAX_EXPANSION * packed
            ):
                raise UsageError(
                    f"has a column chunk of {packed:,} bytes that expands to {expanded:,} "
                    f"({chunk.path_in_schema}); the limit is {MAX_CHUNK_BYTES:,}: write smaller row groups"
                )


def _drop_huge(piece: pa.RecordBatch, offset: int, faults: dict[int, str]) -> pa.RecordBatch:
    plain = pa.RecordBatch.from_arrays([to_plain(column) for column in piece.columns], names=piece.schema.names)
    sizes = row_bytes(plain)
    huge = np.flatnonzero(sizes > MAX_ROW_BYTES)
    for index in huge:
        faults[offset + int(index)] = (
            f"the row has {int(sizes[index]):,} bytes, the limit is {MAX_ROW_BYTES:,}; shorten it"
        )
    if not len(huge):
        return plain
    kept = pa.array(np.arange(len(plain)), mask=sizes > MAX_ROW_BYTES)
    return plain.take(kept)


def _parquet_batch(held: list[pa.RecordBatch], faults: dict[int, str], start: int) -> RowBatch:
    batch = pa.concat_batches(held)
    return RowBatch(
        lines=np.arange(start, start + len(batch), dtype=np.int64),
        columns=dict(zip(batch.schema.names, batch.columns, strict=True)),
        faults=faults,
    )


PARQUET = ParquetReader()
