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

_ROWS_PER_GROUP = 100
"""The hub's viewer reads a group at a time."""


class Parquet(ExportFormat):
    """`data/train-00000-of-00012.parquet`: the picture first, then the row."""

    taken = (PICTURE.name,)

    def files(self, shard: Shard, rows: pa.Table, pictures: Sequence[Picture]) -> Iterable[File]:
        """One file of Parquet."""
        values = [{"bytes": picture.data, "path": picture.name} for picture in pictures]
        table = rows.add_column(0, PICTURE, pa.array(values, PICTURE.type)).replace_schema_metadata(FEATURES)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=_ROWS_PER_GROUP)
        return [(f"data/{shard.name}.parquet", buffer.getvalue())]


PARQUET = Parquet()
