"""Delimited manifests: records under a header, CSV or TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.aliases import read_names
from latentmill.jobs.manifests.fields import FIELDS
from latentmill.jobs.manifests.readers import (
    BATCH_BYTES,
    BATCH_ROWS,
    TOO_LONG,
    Layout,
    ManifestFile,
    Reader,
    RowBatch,
    read_lines,
    refuse_wide,
)

MAX_RECORD_BYTES = 4 << 20
"""Bytes of one CSV record over several lines; a quote that is never closed has more."""


@dataclass(frozen=True, slots=True)
class CsvReader(Reader):
    """All values are text; an empty one is missing, except in `prompt` and in carried columns."""

    delimiter: str

    def scan(self, file: ManifestFile) -> Layout:
        """The columns of the header; those that are not parameters are carried as text."""
        header = self._header(file)
        return Layout(
            own=tuple(name for name in FIELDS if name in header),
            carried=tuple(pa.field(name, pa.string()) for name in header if name not in FIELDS),
        )

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:  # noqa: ARG002 - the header says it all
        """A row for each record under the header."""
        header = self._header(file)
        with file.open() as stream:
            records = _Records(stream)
            rows: list[list[str]] = []
            faults: dict[int, str] = {}
            start, size = 1, 0
            reader = csv.reader(records, delimiter=self.delimiter)
            next(reader, None)
            blank = [""] * len(header)
            while True:
                try:
                    row = next(reader)
                    fault = (
                        None
                        if len(row) == len(header)
                        else f"has {len(row)} values, the header has {len(header)}; quote them"
                    )
                except StopIteration:
                    break
                except csv.Error as error:
                    row, fault = blank, f"is not CSV ({error}); close the quotes"
                records.held = 0
                if records.overlong:
                    records.overlong, fault = False, TOO_LONG
                if not row:
                    continue
                if fault:
                    faults[len(rows)] = fault
                rows.append(blank if fault else row)
                size += sum(map(len, row))
                if len(rows) == BATCH_ROWS or size > BATCH_BYTES:
                    yield _csv_batch(header, rows, faults, start)
                    start, size, rows, faults = start + len(rows), 0, [], {}
            yield _csv_batch(header, rows, faults, start)

    def looks_like(self, start: bytes) -> bool:
        """The first line is a header with a column `prompt`."""
        first = start.decode("utf-8-sig", "replace").lstrip().partition("\n")[0]
        try:
            return "prompt" in {cell.strip() for cell in next(csv.reader([first], delimiter=self.delimiter), [])}
        except csv.Error:
            return False

    def _header(self, file: ManifestFile) -> list[str]:
        with file.open() as stream:
            try:
                header = [name.strip() for name in next(csv.reader(_Records(stream), delimiter=self.delimiter), [])]
            except csv.Error as error:
                raise UsageError(f"has a header that is not CSV: {error}") from None
        refuse_wide(len(header))
        return read_names(header, accept=file.accept_aliases)


class _Records:
    """The stream's lines for csv.reader. `overlong` and `held` (bytes) describe the record being read.

    The caller resets both after each record.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = (line for block in read_lines(stream) for line in block)
        self.overlong = False
        self.held = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.overlong = self.overlong or line is None
            self.held += len(line or "")
            if self.held > MAX_RECORD_BYTES:
                raise UsageError(
                    f"has a record of more than {MAX_RECORD_BYTES:,} bytes, over several lines; close the quotes"
                )
            yield "\x00\n" if line is None else line + "\n"


def _csv_batch(header: Sequence[str], rows: list[list[str]], faults: dict[int, str], start: int) -> RowBatch:
    columns: dict[str, Any] = {}
    by_name = zip(header, zip(*rows, strict=True), strict=True) if rows else ((name, ()) for name in header)
    for name, values in by_name:
        is_ours = name in FIELDS and name != "prompt"
        columns[name] = [value if value.strip() else None for value in values] if is_ours else list(values)
    return RowBatch(lines=np.arange(start, start + len(rows), dtype=np.int64), columns=columns, faults=faults)


CSV, TSV = CsvReader(","), CsvReader("\t")
