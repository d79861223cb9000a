"""JSON manifests: one object per line, or one array of objects or prompts; both are streamed."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import readers
from latentmill.jobs.manifests.aliases import read_names
from latentmill.jobs.manifests.fields import FIELDS, shorten
from latentmill.jobs.manifests.readers import MAX_COLUMNS, TOO_LONG, Layout, ManifestFile, Reader, RowBatch, read_lines

_SPACE = " \t\r\n"
_SPACES = re.compile(f"[{_SPACE}]*")
_DEEP = "is nested too deeply; flatten it"

Record = tuple[int, dict[str, Any], str | None]
"""A row's number in its file, its values, and why it cannot be used, or None."""

Records = Callable[[IO[bytes], bool], Iterator[list[Record]]]
"""Reads a file block by block; the second argument says whether other names of the parameters count."""


def _line_records(stream: IO[bytes], accept: bool) -> Iterator[list[Record]]:
    """One object per line; blank lines count in the numbering, but are not rows."""
    start = 1
    for lines in read_lines(stream):
        yield [
            (number, *_parse_line(line, accept))
            for number, line in enumerate(lines, start)
            if line is None or line.strip()
        ]
        start += len(lines)


def _array_records(stream: IO[bytes], accept: bool) -> Iterator[list[Record]]:
    """The members of one array: objects, or texts that are prompts."""
    number = 0
    for values in _members(stream):
        records: list[Record] = []
        for value in values:
            number += 1
            records.append((number, *_as_record({"prompt": value} if isinstance(value, str) else value, accept)))
        yield records


@dataclass(frozen=True, slots=True)
class JsonReader(Reader):
    """`records` reads the file; `opening` is the first character of such a file. A null counts as a missing key."""

    records: Records
    opening: str

    def scan(self, file: ManifestFile) -> Layout:
        """One pass over the file: the parameters that occur, and one Arrow type for every other key."""
        kinds: dict[str, set[str]] = {}
        with file.open() as stream:
            for records in self.records(stream, file.accept_aliases):
                for _, record, _ in records:
                    for key, value in record.items():
                        seen = kinds.setdefault(key, set())
                        if key not in FIELDS:
                            seen.add(_json_kind(value))
                    if len(kinds) > MAX_COLUMNS + len(FIELDS):
                        raise UsageError(
                            f"has more than {MAX_COLUMNS} different keys; nest the variable ones under one key"
                        )
        types = {key: _json_type(seen) for key, seen in kinds.items() if key not in FIELDS}
        return Layout(
            own=tuple(name for name in FIELDS if name in kinds),
            carried=tuple(pa.field(key, type_ or pa.string()) for key, type_ in types.items()),
            json_text=frozenset(key for key, type_ in types.items() if type_ is None),
        )

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:
        """A row for each object."""
        names = [*layout.own, *(entry.name for entry in layout.carried)]
        with file.open() as stream:
            for records in self.records(stream, file.accept_aliases):
                faults = {index: fault for index, (_, _, fault) in enumerate(records) if fault is not None}
                columns: dict[str, Any] = {name: [record.get(name) for _, record, _ in records] for name in names}
                for name in layout.json_text:
                    columns[name] = [
                        _as_text(name, record, index, faults) if name in record else None
                        for index, (_, record, _) in enumerate(records)
                    ]
                numbers = np.array([number for number, _, _ in records], dtype=np.int64)
                yield RowBatch(lines=numbers, columns=columns, faults=faults)

    def looks_like(self, start: bytes) -> bool:
        """The first character opens an object, or an array."""
        return start.decode("utf-8-sig", "replace").lstrip().startswith(self.opening)


def _as_text(name: str, record: dict[str, Any], index: int, faults: dict[int, str]) -> str | None:
    try:
        return json.dumps(record[name], ensure_ascii=False)
    except RecursionError:
        faults.setdefault(index, f"column {shorten(name)} {_DEEP}")
        return None


def _parse_line(line: str | None, accept: bool) -> tuple[dict[str, Any], str | None]:
    if line is None:
        return {}, TOO_LONG
    try:
        value = json.loads(line)
    except RecursionError:
        return {}, f"the line {_DEEP}"
    except ValueError as error:
        return {}, f"the line is not JSON ({error}); write one object per line"
    if not isinstance(value, dict):
        return {}, f"the line holds {type(value).__name__}, expected one JSON object per line"
    return _as_record(value, accept)


def _as_record(value: Any, accept: bool) -> tuple[dict[str, Any], str | None]:
    if not isinstance(value, dict):
        return {}, f"the array holds {type(value).__name__}, expected JSON objects or prompts in quotes"
    if not accept:
        return value, None
    try:
        return dict(zip(read_names(list(value), accept=True), value.values(), strict=True)), None
    except UsageError as error:
        return {}, f"the row {error}"


def _members(stream: IO[bytes]) -> Iterator[list[Any]]:
    """The values of the one array in a file, block by block. Raises UsageError if the file is not one array."""
    decoder, text = json.JSONDecoder(), _Text(stream)
    text.skip_space()
    if text.take() != "[":
        raise UsageError("is not one JSON array of objects or prompts; name it .jsonl if it has one object per line")
    values: list[Any] = []
    count = 0
    text.skip_space()
    if text.peek() == "]":
        text.take()
    else:
        while True:
            count += 1
            block = text.blocks
            values.append(text.value(decoder, count))
            text.skip_space()
            separator = text.take()
            if separator == "]":
                break
            if separator != ",":
                raise UsageError(f"is not JSON after its row {count:,}; it may be cut off: make it again")
            text.skip_space()
            if text.blocks != block:
                yield values
                values = []
    text.skip_space()
    if text.peek():
        raise UsageError("goes on after its array; write one array, or name it .jsonl if it has one object per line")
    yield values


class _Text:
    """A stream of UTF-8 text, read as far as needed; text that was taken is dropped."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._held, self._place, self._ended = "", 0, False
        self.blocks = 0

    def peek(self) -> str:
        """The next character; empty at the end."""
        while self._place == len(self._held) and self._more():
            pass
        return self._held[self._place : self._place + 1]

    def take(self) -> str:
        """The next character; moves past it."""
        character = self.peek()
        self._place += len(character)
        return character

    def skip_space(self) -> None:
        """Move to the next character that is not white space."""
        while character := self.peek():
            if character not in _SPACE:
                return
            match = _SPACES.match(self._held, self._place)
            self._place = self._place if match is None else match.end()

    def value(self, decoder: json.JSONDecoder, number: int) -> Any:
        """The JSON value that starts here; moves past it."""
        while True:
            try:
                value, end = decoder.raw_decode(self._held, self._place)
            except RecursionError:
                raise UsageError(f"has a row {number:,} that {_DEEP}") from None
            except ValueError as error:
                if len(self._held) - self._place > readers.MAX_ROW_BYTES:
                    raise UsageError(
                        f"has a row {number:,} that is not JSON, or longer than {readers.MAX_ROW_BYTES:,} characters "
                        f"({_reason(error)}); correct it, or write one object per line into a .jsonl file"
                    ) from None
                if not self._more():
                    raise UsageError(f"has a row {number:,} that is not JSON ({_reason(error)}); correct it") from None
                continue
            length = end - self._place
            if end < len(self._held) or not self._more():  # a number could go on in the next block
                self._place += length
                return value

    def _more(self) -> bool:
        """Read one more block; False at the end."""
        if self._ended:
            return False
        block = self._stream.read(readers.BLOCK_BYTES)
        if self.blocks == 0:
            readers.refuse_utf16(block)
        self.blocks += 1
        self._ended = not block
        self._held = self._held[self._place :] + self._decode(block, self._ended)
        self._place = 0
        return not self._ended


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        # a float is exact up to 2^53, Arrow's integers up to 2^63
        return "int" if abs(value) <= 2**53 else "long" if -(2**63) <= value < 2**63 else "other"
    return {float: "float", str: "str"}.get(type(value), "other")


def _json_type(kinds: set[str]) -> Any:
    """The narrowest type that carries all the values unchanged, or None if only JSON text does."""
    kinds = kinds - {"null"}
    for type_, accepted in (
        (pa.null(), set[str]()),
        (pa.bool_(), {"bool"}),
        (pa.int64(), {"int", "long"}),
        (pa.float64(), {"int", "float"}),
        (pa.string(), {"str"}),
    ):
        if kinds <= accepted:
            return type_
    return None


JSONL, JSON = JsonReader(_line_records, "{"), JsonReader(_array_records, "[")
