"""A table with the pictures beside it, each named by its row in `file_name`: CSV and JSON lines."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence

import pyarrow as pa
import pyarrow.csv

from latentmill.jobs.exports.format import ExportFormat, File, Picture, Shard
from latentmill.jobs.exports.json_values import is_plain, json_rows, to_json

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""How a text begins that a spreadsheet would run as a formula; the last four are the first ones in wide form."""


class Table(ExportFormat):
    """`train-00000-of-00012.csv`, and its pictures below `images/train/00000/`."""

    taken = ("file_name",)

    def __init__(self, suffix: str, encode: Callable[[pa.Table], bytes]) -> None:
        self._suffix = suffix
        self._encode = encode

    def files(self, shard: Shard, rows: pa.Table, pictures: Sequence[Picture]) -> Iterable[File]:
        """The pictures, then the table."""
        places = [f"images/{shard.folder}/{picture.name}" for picture in pictures]
        yield from zip(places, (picture.data for picture in pictures), strict=True)
        named = rows.add_column(0, self.taken[0], pa.array(places, pa.string()))
        yield f"{shard.name}.{self._suffix}", self._encode(named)


def csv(table: pa.Table, delimiter: str = ",") -> bytes:
    """Texts in quotes, nulls empty; a text that a spreadsheet would run as a formula gets an apostrophe in front."""
    columns = [_harmless(table.column(name)) for name in table.column_names]
    plain = pa.Table.from_arrays(columns, names=[_guarded(name) for name in table.column_names])
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(plain, buffer, pyarrow.csv.WriteOptions(delimiter=delimiter))
    return buffer.getvalue()


def jsonl(table: pa.Table) -> bytes:
    """One object a line."""
    return "".join(f"{to_json(row)}\n" for row in json_rows(table)).encode()


def _harmless(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers as they are; of anything else its text, or its JSON where it has parts."""
    if is_plain(column.type) and not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    values = [row["value"] for row in json_rows(pa.table({"value": column}))]
    texts = [value if value is None or isinstance(value, str) else to_json(value) for value in values]
    return pa.chunked_array([[None if text is None else _guarded(text) for text in texts]], pa.string())


def _guarded(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


CSV, JSONL = Table("csv", csv), Table("jsonl", jsonl)
