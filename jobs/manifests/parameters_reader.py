"""Text manifests with the parameter blocks of web UIs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from latentmill.jobs.manifests import parameters
from latentmill.jobs.manifests.readers import (
    BATCH_ROWS,
    MAX_ROW_BYTES,
    TOO_LONG,
    Layout,
    ManifestFile,
    ParsedRow,
    Reader,
    RowBatch,
    parsed_batch,
    read_lines,
)

LAYOUT = Layout(own=parameters.COLUMNS, carried=(pa.field("parameters", pa.string()),))


class ParametersReader(Reader):
    """Blocks are separated by blank lines; a line of settings that begins with `Steps:` ends a block, too.

    A row is numbered by the first line of its block.
    """

    def scan(self, file: ManifestFile) -> Layout:  # noqa: ARG002 - the columns are always the same
        """The columns that a block can give."""
        return LAYOUT

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:
        """A row for each block."""
        rows: list[tuple[int, ParsedRow]] = []
        with file.open() as stream:
            for start, lines in _blocks(stream):
                rows.append((start, ({}, TOO_LONG) if lines is None else parameters.read_parameters(lines)))
                if len(rows) == BATCH_ROWS:
                    yield parsed_batch(rows, layout)
                    rows = []
        yield parsed_batch(rows, layout)

    def looks_like(self, start: bytes) -> bool:
        """One of the first lines is a negative prompt or a line of settings."""
        lines = start.decode("utf-8", "replace").split("\n")
        return any(line.startswith(parameters.PROMPT_STARTS) or parameters.is_settings(line) for line in lines)


def _blocks(stream: IO[bytes]) -> Iterator[tuple[int, list[str] | None]]:
    """Each block's first line's number and its lines, or None for one that is too long to be held."""
    number, first, size = 0, 0, 0
    block: list[str] = []
    too_long = False
    for lines in read_lines(stream):
        for line in lines:
            number += 1
            text = None if line is None else line.removesuffix("\r")
            if text is None or size + len(text) > MAX_ROW_BYTES:
                too_long, text = True, "-"
                block = block[:1]
            if not text.strip():
                if block:
                    yield first, None if too_long else block
                block, size, too_long = [], 0, False
                continue
            if not block:
                first = number
            block.append(text)
            size += len(text)
            if text.startswith("Steps:") and parameters.is_settings(text):
                yield first, None if too_long else block
                block, size, too_long = [], 0, False
    if block:
        yield first, None if too_long else block


PARAMETERS = ParametersReader()
