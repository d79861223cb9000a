"""Parquet files in memory as tables, read in the calling thread with limits.

`pyarrow.parquet.read_table` goes through the dataset scanner, whose threads may outlive the call: in a process that
ends soon afterwards they abort it (measured: 55 of 120 exits with pyarrow 26; apache/arrow issues 34314 and 50482).

A file of a few kilobytes can unpack to gigabytes: a page packs a thousandfold, and a value that stands once in a
dictionary may be that of every row. So the sizes in the footer are checked first, and texts stay dictionary-encoded
until they are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_UNCOUNTED_BYTES = 64 << 20
"""Bytes that may be unpacked without counting."""


class OversizeError(ValueError):
    """A Parquet file that has more rows, or unpacks to more bytes, than its place allows."""


def read_parquet(
    data: bytes, columns: Sequence[str] | None = None, *, max_rows: float = math.inf, max_bytes: float = math.inf
) -> pa.Table:
    """The whole file or some of its columns, with the file's metadata in the schema.

    Raises what pyarrow raises, and OversizeError for more than so many rows, or bytes in memory.
    """
    names = None if columns is None else list(columns)
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        rows, metadata, schema = file.metadata.num_rows, file.metadata, file.schema_arrow
        if rows > max_rows:
            raise OversizeError(f"it has {rows:,} rows, and at most {max_rows:,} belong there")
        packed = _packed_bytes(metadata, names)
        if max_bytes == math.inf or rows * packed <= min(max_bytes, _UNCOUNTED_BYTES):
            return file.read(columns=names, use_threads=False)
    if names is not None:
        schema = pa.schema([schema.field(name) for name in names], schema.metadata)
    fixed = sum(rows * field.type.bit_width // 8 for field in schema if _is_fixed(field.type))
    _check_bytes(max(packed, fixed), max_bytes)
    texts = [field.name for field in schema if _is_text(field.type)]
    with pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts) as file:
        table = file.read(columns=names, use_threads=False)
    _check_bytes(fixed + sum(_text_bytes(table.column(name)) for name in texts), max_bytes)
    return table.cast(schema)


def _check_bytes(size: int, max_bytes: float) -> None:
    if size > max_bytes:
        raise OversizeError(f"it unpacks to {size:,} bytes, and at most {max_bytes:,} belong there")


def _packed_bytes(metadata: Any, columns: Sequence[str] | None) -> int:
    """The columns' bytes once they are decompressed: a value of a dictionary counts once, however often it is used."""
    chunks = (
        metadata.row_group(group).column(index)
        for group in range(metadata.num_row_groups)
        for index in range(metadata.num_columns)
    )
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if columns is None or chunk.path_in_schema.split(".")[0] in columns
    )


def _is_text(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_large_binary(kind)
    )


def _is_fixed(kind: Any) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_fixed_size_binary(kind))


def _text_bytes(column: pa.ChunkedArray) -> int:
    """The texts' total size, from their dictionaries."""
    total = 0
    for piece in column.chunks:
        if not pa.types.is_dictionary(piece.type):
            total += piece.nbytes
            continue
        lengths = pc.binary_length(piece.dictionary).cast(pa.int64())
        total += pc.sum(lengths.take(piece.indices)).as_py() or 0
    return total
