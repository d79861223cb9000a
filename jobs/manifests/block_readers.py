"""Manifests in the words of web UIs as batches of rows: parameter blocks, PNG files that hold one, lines with flags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from latentmill.jobs.manifests import parameters, prompt_flags
from latentmill.jobs.manifests.readers import BATCH_ROWS, MAX_ROW_BYTES, TOO_LONG, Layout, Opener, RowBatch, read_lines

PARAMETERS_LAYOUT = Layout(own=parameters.COLUMNS, carried=(pa.field("parameters", pa.string()),))
PNG_LAYOUT = Layout(own=(*parameters.COLUMNS, "id"), carried=PARAMETERS_LAYOUT.carried)
FLAGS_LAYOUT = Layout(own=prompt_flags.COLUMNS, carried=())

_LOOK_BYTES = 1 << 16

Parsed = tuple[dict[str, Any], str | None]


def guess_format(stream: IO[bytes]) -> str | None:
    """`parameters` or `flags` if the start of a text file is no plain list of prompts, and the line that says so."""
    lines = stream.read(_LOOK_BYTES).decode("utf-8", "replace").split("\n")
    for line in lines:
        if line.startswith(("Negative prompt:", "Positive prompt:")) or parameters.is_settings(line):
            return "parameters"
        if line.startswith(("--prompt ", "--prompt=")):
            return "flags"
    return None


def read_blocks(opener: Opener) -> Iterator[RowBatch]:
    """Blocks between blank lines; a line of settings that begins with `Steps:` ends one, too.

    A row's number is that of its block's first line.
    """
    rows: list[tuple[int, Parsed]] = []
    with opener() as stream:
        for start, lines in _blocks(stream):
            rows.append((start, ({}, TOO_LONG) if lines is None else parameters.read_parameters(lines)))
            if len(rows) == BATCH_ROWS:
                yield _batch(rows, PARAMETERS_LAYOUT)
                rows = []
    yield _batch(rows, PARAMETERS_LAYOUT)


def read_flag_lines(opener: Opener) -> Iterator[RowBatch]:
    """One row per line that is not blank; a row's number is its line's."""
    number = 0
    with opener() as stream:
        for lines in read_lines(stream):
            rows: list[tuple[int, Parsed]] = []
            for line in lines:
                number += 1
                if line is None:
                    rows.append((number, ({}, TOO_LONG)))
                elif line.strip():
                    rows.append((number, prompt_flags.read_flags(line.removesuffix("\r"))))
            yield _batch(rows, FLAGS_LAYOUT)


def read_png(opener: Opener, name: str) -> Iterator[RowBatch]:
    """The one row of a picture that holds its own parameters, as this program's and web UIs' do; its id is the name."""
    with opener() as stream:
        try:
            with Image.open(stream, formats=["PNG"]) as image:
                text = getattr(image, "text", {}).get("parameters")
            fault = "the picture holds no parameters text; it was not made by this program or a web UI, or was edited"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            text, fault = None, f"cannot be read as a PNG file ({' '.join(str(error).split())})"
    parsed: Parsed = ({}, fault) if text is None else parameters.read_parameters(text.split("\n"))
    parsed[0]["id"] = name
    yield _batch([(1, parsed)], PNG_LAYOUT)


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


def _batch(rows: Sequence[tuple[int, Parsed]], layout: Layout) -> RowBatch:
    names = [*layout.own, *(entry.name for entry in layout.carried)]
    return RowBatch(
        lines=np.array([number for number, _ in rows], dtype=np.int64),
        columns={name: [row.get(name) for _, (row, _) in rows] for name in names},
        faults={index: fault for index, (_, (_, fault)) in enumerate(rows) if fault is not None},
    )
