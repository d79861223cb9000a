"""Parquet files with the pictures in them, as the Hugging Face hub shows them: `struct<bytes, path>` and its key."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.jobs.exports.format import ExportFormat, File, Picture, Shard

PICTURE = pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))
FEATURES = {"huggingface": json.dumps({"info": {"features": {PICTURE.name: {"_type": "Image"}}}})}
"""What tells readers of the hub that the column holds pictures; the types of the others are Arrow's own."""

_ROWS_PER_GROUP, _BYTES_PER_GROUP = 100, 32_000_000
"""The hub's viewer reads a group at a time."""


class Parquet(ExportFormat):
    """`data/train-00000-of-00012.parquet`: the picture first, then the row."""

    taken = (PICTURE.name,)

    def files(self, shard: Shard, rows: pa.Table, pictures: Sequence[Picture]) -> Iterable[File]:
        """One file of Parquet. Memory holds it, and the pictures of one group once more."""
        schema = pa.schema([PICTURE, *rows.schema], FEATURES)
        names = rows.schema.names  # pictures are packed already, and alike in nothing
        options = {"compression": dict.fromkeys(names, "zstd"), "use_dictionary": names, "write_statistics": names}
        mean = sum(len(picture.data) for picture in pictures) // len(pictures)
        size = max(1, min(_ROWS_PER_GROUP, _BYTES_PER_GROUP // max(1, mean)))
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, **options) as writer:
            for first in range(0, rows.num_rows, size):
                group = pictures[first : first + size]
                values = [{"bytes": picture.data, "path": picture.name} for picture in group]
                table = rows.slice(first, len(group)).add_column(0, PICTURE, pa.array(values, PICTURE.type))
                writer.write_table(table.cast(schema))
        return [(f"data/{shard.name}.parquet", buffer.getvalue())]


PARQUET = Parquet()
