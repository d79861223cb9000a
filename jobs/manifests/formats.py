"""The table of manifest formats: suffixes, compression, and the reader of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from latentmill.jobs.manifests.readers import Reader

LOOK_BYTES = 1 << 16
"""Bytes of a file's start by which its format is recognised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format. `place` names its reader: a module of this folder and an object in it.

    `row` says what a row is, for the documentation; `hint`, for the help, what a format with a shared suffix is for.
    """

    suffixes: tuple[str, ...]
    place: str
    row: str
    hint: str = ""
    gzip: bool = True

    @property
    def reader(self) -> Reader:
        """Loaded when a file is read: readers import pyarrow, and `--help` must not wait for it."""
        module, _, name = self.place.partition(".")
        return cast("Reader", getattr(import_module(f"{__package__}.{module}"), name))


FORMATS: dict[str, Format] = {
    "lines": Format(suffixes=("txt",), place="lines_reader.LINES", row="a line: the prompt"),
    "parameters": Format(
        suffixes=("txt",),
        place="parameters_reader.PARAMETERS",
        hint="web UIs' blocks",
        row="a block as web UIs write it: prompt, `Negative prompt:`, and a line `Steps: ...`",
    ),
    "flags": Format(
        suffixes=("txt",),
        place="flags_reader.FLAGS",
        hint="--prompt ...",
        row='a line with flags: `--prompt "a cat" --seed 3`, or `a cat --d 3 --s 20`',
    ),
    "csv": Format(suffixes=("csv",), place="csv_reader.CSV", row="a record under a header with a column `prompt`"),
    "tsv": Format(suffixes=("tsv",), place="csv_reader.TSV", row="the same, separated by tabs"),
    "jsonl": Format(suffixes=("jsonl",), place="json_reader.JSONL", row="a line: an object with a key `prompt`"),
    "json": Format(
        suffixes=("json",),
        place="json_reader.JSON",
        row="an entry of one array: an object with a key `prompt`, or a prompt in quotes",
    ),
    "parquet": Format(
        suffixes=("parquet",), place="parquet_reader.PARQUET", row="a row, with a column `prompt`", gzip=False
    ),
    "png": Format(
        suffixes=("png",),
        place="png_reader.PNG",
        row="the picture's own `parameters` text, as latentmill and web UIs write it",
        gzip=False,
    ),
}
"""Where formats share a suffix, the first is its usual one, and `--manifest-format` chooses another."""

SUFFIXES = tuple(dict.fromkeys(suffix for format_ in FORMATS.values() for suffix in format_.suffixes))
NOT_GZIPPED = tuple(suffix for format_ in FORMATS.values() if not format_.gzip for suffix in format_.suffixes)


def formats_of(suffix: str) -> list[str]:
    """The names of the formats with this suffix, the usual one first."""
    return [name for name, format_ in FORMATS.items() if suffix in format_.suffixes]


SHARED = {suffix: formats_of(suffix) for suffix in SUFFIXES if len(formats_of(suffix)) > 1}
"""The suffixes that several formats share, each with their names."""

CHOICES = ("auto", *(name for names in SHARED.values() for name in names))
"""The values of `--manifest-format`."""


def describe_choices() -> str:
    """The help of `--manifest-format`."""
    hints = {name: f"{name} ({format_.hint})" if format_.hint else name for name, format_ in FORMATS.items()}
    return " ".join(f"How .{suffix} is read: {', '.join(hints[x] for x in names)}." for suffix, names in SHARED.items())


def suffix_like(start: bytes) -> str:
    """The suffix that suits a file that starts with these bytes; that of plain lines where nothing else does."""
    usual = {suffix: FORMATS[formats_of(suffix)[0]] for suffix in SUFFIXES}
    return next((suffix for suffix, format_ in usual.items() if format_.reader.looks_like(start)), SUFFIXES[0])


def other_format(suffix: str, start: bytes) -> str | None:
    """The format with this suffix, not its usual one, that a file with this start looks like; None if none does."""
    return next((name for name in formats_of(suffix)[1:] if FORMATS[name].reader.looks_like(start)), None)
