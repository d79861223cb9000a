"""Scores beside a dataset: `scores/NAME/part-*.parquet` in the order of its rows, and last `manifest.json`.

The dataset's own files stay as they are. The name of a part holds a digest of all that its values follow from: the
scorer, its version, and the rows with the digests of their pixels. So a part that is there is done, whoever made it,
and parts of another version never count as this one's. A manifest says which parts count.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.jobs.plans.planned import fingerprint
from latentmill.jobs.scores.scorer import check_identity
from latentmill.jobs.store.errors import ForeignObjectError
from latentmill.jobs.store.parquet import OversizeError, read_parquet
from latentmill.jobs.store.storage import Storage

FOLDER = "scores"
KEYS = ("sample_id", "pixel_sha256")
"""The columns by which a row of scores is that of a row of the dataset."""

MAX_PART_ROWS = 50_000
_MANIFEST = re.compile(r"scores/([a-z][a-z0-9]{0,31})/manifest\.json", re.ASCII)
_PART = re.compile(r"scores/([a-z][a-z0-9]{0,31})/part-\d{5,}-[0-9a-f]{16}\.parquet", re.ASCII)
_MAX_MANIFEST_BYTES = 64 << 20
MAX_PART_BYTES = 256 << 20
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePart:
    """One file of scores."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreManifest:
    """What is there of one scorer. `columns` are its columns with their types."""

    scorer: str
    version: str
    plan_hash: str
    columns: Mapping[str, str]
    rows: int
    parts: tuple[ScorePart, ...]

    def to_json(self) -> bytes:
        """The file's bytes: the same manifest always gives the same ones."""
        return (json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, name: str, data: bytes) -> ScoreManifest:
        """Raises ValueError for anything but the manifest of the scorer of that name."""
        try:
            fields = json.loads(data)
            if fields.pop("format") != _FORMAT:
                raise ValueError("it is of a newer format")
            made = cls(**(fields | {"parts": tuple(ScorePart(**part) for part in fields["parts"])}))
            check_identity(made.scorer, made.version, made.columns)
            if made.scorer != name or not isinstance(made.plan_hash, str):
                raise ValueError("it is another scorer's")
            if not all(_is_sound(name, part) for part in made.parts) or made.rows != sum(p.rows for p in made.parts):
                raise ValueError("it names a part that is none")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no manifest of scores: {error}") from error
        return made

    @property
    def schema(self) -> pa.Schema:
        """The columns of its parts."""
        fields = [pa.field(key, pa.string()) for key in KEYS]
        return pa.schema([*fields, *(pa.field(*column) for column in self.fields.items())])

    @property
    def fields(self) -> dict[str, pa.DataType]:
        """The scorer's own columns."""
        return {name: pa.type_for_alias(kind) for name, kind in self.columns.items()}


def _is_sound(name: str, part: ScorePart) -> bool:
    place = _PART.fullmatch(part.path) if isinstance(part.path, str) else None
    sizes = ((part.rows, MAX_PART_ROWS), (part.bytes, MAX_PART_BYTES))
    whole = all(type(value) is int and 1 <= value <= most for value, most in sizes)
    return place is not None and place[1] == name and whole and isinstance(part.sha256, str)


def manifest_path(name: str) -> str:
    """Where the manifest of a scorer lies."""
    return f"{FOLDER}/{name}/manifest.json"


def part_path(name: str, number: int, identity: Sequence[object]) -> str:
    """Where the part of that number lies whose values follow from `identity`."""
    return f"{FOLDER}/{name}/part-{number:05d}-{fingerprint(identity)[:16]}.parquet"


def read_manifest(storage: Storage, name: str) -> ScoreManifest | None:
    """The manifest of a scorer, or None if there is none. Raises ValueError for one that is damaged."""
    try:
        return ScoreManifest.from_json(name, storage.read(manifest_path(name), _MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return None


def scored_names(storage: Storage) -> list[str]:
    """The scorers whose manifests are there, by name."""
    found = (_MANIFEST.fullmatch(path) for path, _ in storage.list(FOLDER))
    return sorted(place[1] for place in found if place is not None)


def encode_part(table: pa.Table) -> bytes:
    """The bytes of a part; the same table always gives the same ones."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def described(path: str, data: bytes, rows: int) -> ScorePart:
    """A part as a manifest names it."""
    return ScorePart(path=path, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def decode_part(data: bytes, schema: pa.Schema) -> pa.Table:
    """The rows of a part. Raises ValueError for any other file."""
    try:
        table = read_parquet(data, max_rows=MAX_PART_ROWS, max_bytes=MAX_PART_BYTES)
    except (pa.ArrowException, OSError, OversizeError) as error:
        raise ValueError(f"it is no part of scores: {error}") from error
    if not table.schema.equals(schema):
        raise ValueError("it has other columns than its manifest names")
    return table


def read_part(storage: Storage, part: ScorePart, schema: pa.Schema) -> pa.Table:
    """The rows of a named part. Raises ValueError if it is not as it was written."""
    try:
        data = storage.read(part.path, part.bytes)
    except (FileNotFoundError, ForeignObjectError) as error:
        raise ValueError(f"not readable: {error}") from error
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ValueError(f"{len(data)} bytes that do not match the digest in its manifest")
    return decode_part(data, schema)


def delete_unnamed(storage: Storage, manifest: ScoreManifest) -> None:
    """Remove this scorer's parts that its manifest does not name: those of other rows, or of another version.

    Where another manifest was written meanwhile, nothing is removed.
    """
    if storage.read(manifest_path(manifest.scorer)) != manifest.to_json():
        return
    named = {part.path for part in manifest.parts}
    for path, _ in list(storage.list(f"{FOLDER}/{manifest.scorer}")):
        if _PART.fullmatch(path) and path not in named:
            storage.delete(path)
