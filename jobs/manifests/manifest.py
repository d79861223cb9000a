"""The user's prompt files as one stream of rows: several files or globs, any allowed place, constant memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Literal, cast

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import block_readers, parquet_reader, readers
from latentmill.jobs.manifests.fields import FIELDS, nearest, shorten
from latentmill.jobs.manifests.readers import Layout, RowBatch
from latentmill.jobs.store.errors import describe
from latentmill.jobs.store.urls import allowed_filesystem, display_url

Format = Literal["txt", "csv", "tsv", "jsonl", "parquet", "png", "parameters", "flags"]
SUFFIXES: tuple[Format, ...] = ("txt", "csv", "tsv", "jsonl", "parquet", "png")
_TEXT_FORMATS = {"parameters", "flags"}
_NOT_GZIPPED = {"parquet", "png"}
MAX_FILES = 10_000
_DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file of the manifest and what a first look at it has shown. `name` may be shown to anyone."""

    name: str
    fs: AbstractFileSystem
    path: str
    format: Format
    gzipped: bool
    layout: Layout

    def batches(self) -> Iterator[RowBatch]:
        """All rows in the file's order. Raises UsageError if the file cannot be read to its end."""
        opener = _opener(self.fs, self.path, gzipped=self.gzipped)
        with _readable(self.name):
            if self.format == "txt":
                yield from readers.read_text(opener)
            elif self.format == "parameters":
                yield from block_readers.read_blocks(opener)
            elif self.format == "flags":
                yield from block_readers.read_flag_lines(opener)
            elif self.format == "png":
                yield from block_readers.read_png(opener, self.path.rpartition("/")[2])
            elif self.format == "jsonl":
                yield from readers.read_jsonl(opener, self.layout)
            elif self.format == "parquet":
                carried = (entry.name for entry in self.layout.carried)
                yield from parquet_reader.read_parquet(opener, [*self.layout.own, *carried])
            else:
                delimiter = _DELIMITERS[self.format]
                yield from readers.read_csv(opener, delimiter, readers.read_header(opener, delimiter))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The sources in order and the columns that are carried through, with one type each.

    `own` holds those of our columns that at least one source has.
    """

    sources: tuple[Source, ...]
    own: tuple[str, ...]
    carried: pa.Schema


def open_manifest(patterns: Sequence[str], text_format: str = "auto") -> Manifest:
    """Find and look at every file. Raises UsageError for one that is missing, unreadable or without prompts.

    `text_format` says how .txt files are read: one of `parameters.MANIFEST_FORMATS`.
    """
    found = [file for pattern in patterns for file in _expand(pattern)]
    if len(found) > MAX_FILES:
        raise UsageError(f"{len(found):,} manifest files, the limit is {MAX_FILES:,}; join them into fewer")
    sources = tuple(_look(*file, text_format) for file in found)
    types: dict[str, tuple[Any, str]] = {}
    for source in sources:
        for entry in source.layout.carried:
            type_, first = types.setdefault(entry.name, (entry.type, source.name))
            if pa.types.is_null(type_):
                types[entry.name] = (entry.type, source.name)
            elif not type_.equals(entry.type) and not pa.types.is_null(entry.type):
                raise UsageError(
                    f"column {shorten(entry.name)} is {type_} in {first} but {entry.type} in {source.name}; "
                    "give it one type, or rename one"
                )
    return Manifest(
        sources=sources,
        own=tuple(name for name in FIELDS if any(name in source.layout.own for source in sources)),
        carried=pa.schema([pa.field(name, type_) for name, (type_, _) in types.items()]),
    )


def _expand(pattern: str) -> list[tuple[str, AbstractFileSystem, str]]:
    """The files that a path or glob names, sorted, each with a name that may be shown."""
    fs, path = allowed_filesystem(pattern)
    name = display_url(pattern)
    with _readable(name):
        if fs.isfile(path):
            return [(name, fs, path)]
        if any(character in path for character in "*?["):
            matches = sorted(match for match in fs.glob(path) if fs.isfile(match))
            if not matches:
                raise UsageError("matches no file; check the pattern")
            local = "://" not in pattern
            return [(match if local else display_url(str(fs.unstrip_protocol(match))), fs, match) for match in matches]
        if fs.isdir(path):
            raise UsageError("is a folder; name its files, for example with a glob such as FOLDER/*.parquet")
    raise UsageError(f"manifest {name} does not exist; check the path")


def _look(name: str, fs: AbstractFileSystem, path: str, text_format: str) -> Source:
    lower = path.lower()
    gzipped = lower.endswith(".gz")
    suffix = lower.removesuffix(".gz").rpartition(".")[2]
    if suffix not in SUFFIXES or (gzipped and suffix in _NOT_GZIPPED):
        raise UsageError(
            f"manifest {name} is of an unknown kind; known are .{', .'.join(SUFFIXES)}, and .gz of all but "
            ".parquet and .png"
        )
    format_: Format = cast(Format, text_format) if suffix == "txt" and text_format in _TEXT_FORMATS else suffix
    opener = _opener(fs, path, gzipped=gzipped)
    with _readable(name):
        if fs.size(path) == 0:
            raise UsageError("is empty; put at least one prompt into it")
        if format_ in _LAYOUTS:
            layout = _LAYOUTS[format_]
            if format_ == "txt" and text_format == "auto":
                _refuse_other_text(opener)
        elif format_ == "jsonl":
            layout = readers.scan_jsonl(opener)
        elif format_ == "parquet":
            layout = parquet_reader.scan_parquet(opener)
        else:
            layout = readers.csv_layout(readers.read_header(opener, _DELIMITERS[format_]))
        if "prompt" not in layout.own:
            columns = [*layout.own, *(entry.name for entry in layout.carried)]
            shown = ", ".join(shorten(column, 30) for column in columns[:8]) or "nothing"
            raise UsageError(
                f"has no column 'prompt'{nearest('prompt', columns)}; it has {shown}: rename the one with the prompts"
            )
    return Source(name=name, fs=fs, path=path, format=format_, gzipped=gzipped, layout=layout)


_LAYOUTS: dict[str, Layout] = {
    "txt": Layout(own=("prompt",), carried=()),
    "parameters": block_readers.PARAMETERS_LAYOUT,
    "flags": block_readers.FLAGS_LAYOUT,
    "png": block_readers.PNG_LAYOUT,
}
"""What files hold that need no look: their columns are always the same."""


def _refuse_other_text(opener: readers.Opener) -> None:
    """Blocks or flags read as plain lines would be silent nonsense."""
    with opener() as stream:
        other = block_readers.guess_format(stream)
    if other is not None:
        raise UsageError(
            f"does not look like one prompt per line; use manifest_format {other}, or lines if these are prompts"
        )


def _opener(fs: AbstractFileSystem, path: str, *, gzipped: bool) -> readers.Opener:
    return partial(_open, fs, path, gzipped)


@contextmanager
def _open(fs: AbstractFileSystem, path: str, gzipped: bool) -> Iterator[IO[bytes]]:
    with fs.open(path, "rb") as raw:
        if gzipped:
            with gzip.open(raw) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield raw


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line that names the file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"manifest {name} {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"manifest {name} is not a whole gzip file ({error}); make it again") from None
    except pa.ArrowException as error:
        raise UsageError(f"manifest {name} is not a whole Parquet file ({_one_line(error)}); make it again") from None
    except FileNotFoundError:
        raise UsageError(f"manifest {name} does not exist; check the path") from None
    except Exception as error:
        # every store's library has its own tree of exceptions for "cannot read"
        raise UsageError(
            f"manifest {name} cannot be read ({describe(error)}); check address, rights and credentials"
        ) from error


def _one_line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()), 200).strip("'\"")
