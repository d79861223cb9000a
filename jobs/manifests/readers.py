"""Text manifests (lines, CSV) as batches of rows, streaming and in constant memory.

A reader never raises for a bad row: it gives the row's number and the reason in `RowBatch.faults`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import FIELDS

BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 20
"""A longer line or value is rejected without being held in memory."""

BATCH_ROWS = 16_384
BATCH_BYTES = 8 << 20
MAX_COLUMNS = 256
MAX_BLANK_LINES = 1_000_000
"""More are refused where there are ten of them for each line of text: a few bytes of gzip hold them by the billion."""

MAX_RECORD_BYTES = 4 << 20
"""The lines that one CSV record may span: a quote that is never closed, or columns without end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBatch:
    """Some rows of one file. `lines` numbers them inside the file from 1; `faults` maps a row's index to a reason.

    Each column is a list of Python values or an Arrow array, one entry per row.
    """

    lines: NDArray[np.int64]
    columns: Mapping[str, Any]
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)


Opener = Callable[[], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a first look at a file shows: which of our columns it has, and the type of every other one.

    `json_text` names the columns of JSON values that have no type in common and are carried as JSON text.
    """

    own: tuple[str, ...]
    carried: tuple[pa.Field, ...]
    json_text: frozenset[str] = frozenset()


def read_lines(stream: IO[bytes]) -> Iterator[list[str | None]]:
    """Lines without their newlines, by the block; None stands for a line over the limit, whose bytes were dropped.

    Bytes that are not UTF-8 become lone surrogates, which no prompt may hold.
    """
    tail, dropping, first = b"", False, True
    blank = text = 0
    while block := stream.read(BLOCK_BYTES):
        if first:
            refuse_utf16(block)
            block = block.removeprefix(b"\xef\xbb\xbf")
            first = False
        pieces = block.split(b"\n")
        if dropping:
            if len(pieces) == 1:
                continue
            pieces[0], dropping = b"", False
            yield [None]
            pieces = pieces[1:]
        else:
            pieces[0] = tail + pieces[0]
        tail = pieces.pop()
        if len(tail) > MAX_ROW_BYTES:
            tail, dropping = b"", True
        with_text = sum(map(bool, map(bytes.strip, pieces)))
        blank, text = blank + len(pieces) - with_text, text + with_text
        if blank > max(MAX_BLANK_LINES, 10 * text):
            raise UsageError(f"has {blank:,} blank lines up to here, {text:,} with text; remove the blank ones")
        yield [_decode(piece) for piece in pieces]
    if dropping or tail:
        yield [None if dropping else _decode(tail)]


def refuse_utf16(block: bytes) -> None:
    """The start of a file as Windows programs write it would be read as nonsense."""
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError("is UTF-16; save it as UTF-8")


def _decode(line: bytes) -> str | None:
    if len(line) > MAX_ROW_BYTES:
        return None
    return line.decode("utf-8", "surrogateescape")


TOO_LONG = f"the line has more than {MAX_ROW_BYTES:,} bytes; shorten it"


def read_text(opener: Opener) -> Iterator[RowBatch]:
    """One prompt per line. Blank lines are no rows, but they count in the numbering, so numbers are line numbers."""
    start = 1
    with opener() as stream:
        for lines in read_lines(stream):
            kept = [index for index, line in enumerate(lines) if line is None or line.strip()]
            numbers = np.array(kept, dtype=np.int64) + start
            start += len(lines)
            prompts = [line if line is None else line.removesuffix("\r") for line in map(lines.__getitem__, kept)]
            faults = {index: TOO_LONG for index, prompt in enumerate(prompts) if prompt is None}
            yield RowBatch(lines=numbers, columns={"prompt": prompts}, faults=faults)


class _Records:
    """The stream as csv.reader wants it: text lines, with a note of the over-long ones and of what is `held`.

    Whoever has taken a record sets these back.
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


def read_header(opener: Opener, delimiter: str) -> list[str]:
    """The names in the first record of a CSV file."""
    with opener() as stream:
        try:
            header = [name.strip() for name in next(csv.reader(_Records(stream), delimiter=delimiter), [])]
        except csv.Error as error:
            raise UsageError(f"has a header that is not CSV: {error}") from None
    refuse_wide(len(header))
    return header


def refuse_wide(columns: int) -> None:
    """Before anything is done with each of them."""
    if columns > MAX_COLUMNS + len(FIELDS):
        raise UsageError(f"has {columns:,} columns, the limit is {MAX_COLUMNS}; drop those that are not needed")


def csv_layout(header: Sequence[str]) -> Layout:
    """The layout under a header: what is not ours is carried as text."""
    return Layout(
        own=tuple(name for name in FIELDS if name in header),
        carried=tuple(pa.field(name, pa.string()) for name in header if name not in FIELDS),
    )


def read_csv(opener: Opener, delimiter: str, header: Sequence[str]) -> Iterator[RowBatch]:
    """Records under a header, all text; an empty value is missing, except in `prompt` and in carried columns."""
    with opener() as stream:
        records = _Records(stream)
        rows: list[list[str]] = []
        faults: dict[int, str] = {}
        start, size = 1, 0
        reader = csv.reader(records, delimiter=delimiter)
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


def _csv_batch(header: Sequence[str], rows: list[list[str]], faults: dict[int, str], start: int) -> RowBatch:
    columns: dict[str, Any] = {}
    by_name = zip(header, zip(*rows, strict=True), strict=True) if rows else ((name, ()) for name in header)
    for name, values in by_name:
        is_ours = name in FIELDS and name != "prompt"
        columns[name] = [value if value.strip() else None for value in values] if is_ours else list(values)
    return RowBatch(lines=np.arange(start, start + len(rows), dtype=np.int64), columns=columns, faults=faults)
