"""The user's prompt files as one stream of rows: several files or globs, any allowed place, constant memory."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, cast

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import standard_input
from latentmill.jobs.manifests.aliases import alias_of, meant_by
from latentmill.jobs.manifests.fields import FIELDS, nearest, shorten
from latentmill.jobs.manifests.formats import FORMATS, LOOK_BYTES, NOT_GZIPPED, SUFFIXES, formats_of, other_format
from latentmill.jobs.manifests.readers import Layout, ManifestFile, RowBatch
from latentmill.jobs.store.inputs import reading
from latentmill.jobs.store.urls import allowed_filesystem, display_url

MAX_FILES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file of the manifest, after its scan. `name` may be shown to anyone."""

    name: str
    fs: AbstractFileSystem
    path: str
    file: ManifestFile
    format: str
    layout: Layout

    @property
    def folder(self) -> str:
        """Where relative paths in its rows begin: where it lies, or the working directory for standard input."""
        if self.name == standard_input.SHOWN_AS:
            return os.getcwd()  # noqa: PTH109 - text, as fsspec wants it
        parent = self.path.rpartition("/")[0]
        return parent if "file" in self.fs.protocol else str(self.fs.unstrip_protocol(parent))

    def batches(self) -> Iterator[RowBatch]:
        """All rows in the file's order. Raises UsageError if the file cannot be read to its end."""
        with _readable(self.name):
            yield from FORMATS[self.format].reader.read(self.file, self.layout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A carried column whose name is an alias of a parameter, or one edit away: the parameter may have been meant.

    `beside` says that the file has a column for the parameter, too.
    """

    source: str
    column: str
    parameter: str
    is_alias: bool
    beside: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The sources in order and the columns that are carried through, with one type each.

    `own` holds the parameters that at least one source has as a column.
    """

    sources: tuple[Source, ...]
    own: tuple[str, ...]
    carried: pa.Schema

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """The carried columns that may be misspelled parameters, each with the first file that has it."""
        found: dict[str, Suspect] = {}
        for source in self.sources:
            for column in (entry.name for entry in source.layout.carried if entry.name not in found):
                parameter = meant_by(column)
                if parameter is not None and parameter != "prompt":  # a prompt column exists in every file
                    found[column] = Suspect(
                        source=source.name,
                        column=column,
                        parameter=parameter,
                        is_alias=alias_of(column) is not None,
                        beside=parameter in source.layout.own,
                    )
        return tuple(found.values())


def open_manifest(patterns: Sequence[str], text_format: str = "auto", *, accept_aliases: bool = False) -> Manifest:
    """Find and scan every file. Raises UsageError if one is missing, unreadable or without prompts.

    `text_format` says how .txt files are read: one of `formats.CHOICES`. With `accept_aliases`, other programs' names
    of the parameters count.
    """
    if sum(pattern in standard_input.NAMES for pattern in patterns) > 1:
        raise UsageError("standard input is named twice as a manifest; it can be read once")
    found = [file for pattern in patterns for file in _expand(pattern)]
    if len(found) > MAX_FILES:
        raise UsageError(f"{len(found):,} manifest files, the limit is {MAX_FILES:,}; join them into fewer")
    sources = tuple(_scan(*file, text_format, accept_aliases=accept_aliases) for file in found)
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
    if pattern in standard_input.NAMES:
        fs, path = allowed_filesystem(str(standard_input.spooled_input()))
        return [(standard_input.SHOWN_AS, fs, path)]
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
        if "file" in fs.protocol:
            _refuse_special(path)
    raise UsageError(f"manifest {name} does not exist; check the path")


def _refuse_special(path: str) -> None:
    """Refuse a local path that is neither file nor folder, by its kind: opening a pipe would wait forever."""
    if not os.path.lexists(path):
        return
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - the path is a string as fsspec wants it
    except OSError as error:
        raise UsageError(f"is a broken link ({error.strerror or error}); check where it points") from None
    kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
    raise UsageError(f"is a {kind}, and rows are read more than once; write a file, or pipe into: latentmill ... -")


def _scan(name: str, fs: AbstractFileSystem, path: str, text_format: str, *, accept_aliases: bool) -> Source:
    lower = path.lower()
    gzipped = lower.endswith(".gz")
    suffix = lower.removesuffix(".gz").rpartition(".")[2]
    formats = formats_of(suffix)
    if not formats or (gzipped and suffix in NOT_GZIPPED):
        raise UsageError(
            f"manifest {name} is of an unknown kind; known are .{', .'.join(SUFFIXES)}, and .gz of all but "
            f".{' and .'.join(NOT_GZIPPED)}"
        )
    format_ = text_format if text_format in formats else formats[0]
    file = ManifestFile(
        open=partial(_open, fs, path, gzipped), name=path.rpartition("/")[2], accept_aliases=accept_aliases
    )
    with _readable(name):
        if fs.size(path) == 0:
            raise UsageError("is empty; put at least one prompt into it")
        if text_format == "auto" and len(formats) > 1:
            _refuse_other(file, suffix)
        layout = FORMATS[format_].reader.scan(file)
        if "prompt" not in layout.own:
            raise UsageError(_without_prompt([*layout.own, *(entry.name for entry in layout.carried)]))
    return Source(name=name, fs=fs, path=path, file=file, format=format_, layout=layout)


def _without_prompt(columns: Sequence[str]) -> str:
    alias = next((column for column in columns if alias_of(column) == "prompt"), None)
    if alias is not None:
        return f"has no column 'prompt', did you mean {shorten(alias)}? Rename it, or say --accept-aliases"
    shown = ", ".join(shorten(column, 30) for column in columns[:8]) or "nothing"
    return f"has no column 'prompt'{nearest('prompt', columns)}; it has {shown}: rename the one with the prompts"


def _refuse_other(file: ManifestFile, suffix: str) -> None:
    """Refuse blocks or flags that would silently be read as plain prompts."""
    with file.open() as stream:
        other = other_format(suffix, stream.read(LOOK_BYTES))
    if other is not None:
        raise UsageError(
            f"does not look like one prompt per line; use manifest_format {other}, or lines if these are prompts"
        )


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
    """Turn every error while a file is read into one line that names the file."""
    with reading(f"manifest {name}"):
        try:
            yield
        except UsageError as error:
            raise UsageError(f"manifest {name} {error}") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"manifest {name} is not a whole gzip file ({error}); make it again") from None
        except pa.ArrowException as error:
            reason = _one_line(error)
            raise UsageError(f"manifest {name} is not a whole Parquet file ({reason}); make it again") from None


def _one_line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()), 200).strip("'\"")
