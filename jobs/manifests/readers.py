"""What all readers of manifests share: the interface, batches of rows, limits, and lines in constant memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
"""More are refused if there are ten for each line of text: a few bytes of gzip can hold billions."""


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


ParsedRow = tuple[dict[str, Any], str | None]
"""A row's values by column, and why it cannot be used, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a scan of a file shows: which parameters it has as columns (`own`), and the types of the carried columns.

    `json_text` names the columns of JSON values that have no common type and are carried as JSON text.
    """

    own: tuple[str, ...]
    carried: tuple[pa.Field, ...]
    json_text: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestFile:
    """One file as its reader sees it: `open` gives the decompressed bytes, as often as asked."""

    open: Callable[[], AbstractContextManager[IO[bytes]]]
    name: str
    accept_aliases: bool = False


class Reader(ABC):
    """How one format is read, streaming. A bad row never raises: its reason goes into `RowBatch.faults`.

    A file that cannot be read as a whole raises UsageError, with a message that continues "manifest NAME ...".
    """

    @abstractmethod
    def scan(self, file: ManifestFile) -> Layout:
        """The file's columns, before any row is used."""

    @abstractmethod
    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:
        """All rows, in the file's order, with the columns of `layout`."""

    def looks_like(self, start: bytes) -> bool:  # noqa: ARG002 - a format need not be recognisable
        """Whether a file that starts with these bytes has this format; asked if no suffix says so."""
        return False


def read_lines(stream: IO[bytes]) -> Iterator[list[str | None]]:
    """Lines without their newlines, block by block; None is a line over the limit, whose bytes were dropped.

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
    """Refuse text as some Windows programs write it, which would be read as nonsense."""
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError("is UTF-16; save it as UTF-8")


def _decode(line: bytes) -> str | None:
    if len(line) > MAX_ROW_BYTES:
        return None
    return line.decode("utf-8", "surrogateescape")


TOO_LONG = f"the line has more than {MAX_ROW_BYTES:,} bytes; shorten it"


def parsed_batch(rows: Sequence[tuple[int, ParsedRow]], layout: Layout) -> RowBatch:
    """A batch of rows that were parsed one by one, each with its number."""
    names = [*layout.own, *(entry.name for entry in layout.carried)]
    return RowBatch(
        lines=np.array([number for number, _ in rows], dtype=np.int64),
        columns={name: [row.get(name) for _, (row, _) in rows] for name in names},
        faults={index: fault for index, (_, (_, fault)) in enumerate(rows) if fault is not None},
    )


def refuse_wide(columns: int) -> None:
    """Refuse too many columns, before any work per column."""
    if columns > MAX_COLUMNS + len(FIELDS):
        raise UsageError(f"has {columns:,} columns, the limit is {MAX_COLUMNS}; drop those that are not needed")
