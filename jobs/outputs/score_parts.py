"""The scores of one scorer beside a dataset, part by part: what is there already, what is written, what it all says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.job import Job
from latentmill.jobs.scores.duplicates import Duplicates, find_duplicates
from latentmill.jobs.scores.scorer import Scorer, Value
from latentmill.jobs.scores.side_files import (
    KEYS,
    MAX_PART_BYTES,
    ScoreManifest,
    ScorePart,
    decode_part,
    delete_unnamed,
    described,
    encode_part,
    manifest_path,
    part_path,
    read_manifest,
    read_part,
)
from latentmill.jobs.store.errors import ForeignObjectError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSummary:
    """What is there of one scorer. `written` parts are this run's; the others were there."""

    name: str
    version: str
    rows: int
    scored: int
    """Values of its fullest column."""
    parts: int
    written: int
    made: int
    """Pictures that this process scored. The others were scored before, or on Ray."""
    columns: Mapping[str, tuple[float, float, float] | None]
    """Each column, with its least, mean and greatest value; None where it has no numbers."""
    duplicates: Duplicates | None = None
    """Pictures that look alike, where the scorer has hashes."""


class _Tally:
    """Least, mean and greatest of the values of a column."""

    def __init__(self) -> None:
        self._count, self._sum, self._least, self._greatest = 0, 0.0, math.inf, -math.inf

    def add(self, column: pa.ChunkedArray) -> None:
        if not pa.types.is_string(column.type) and column.null_count < len(column):
            ends = pc.min_max(column)
            self._count += len(column) - column.null_count
            self._sum += float(pc.sum(column).as_py())
            self._least = min(self._least, ends["min"].as_py())
            self._greatest = max(self._greatest, ends["max"].as_py())

    @property
    def ends(self) -> tuple[float, float, float] | None:
        return (self._least, self._sum / self._count, self._greatest) if self._count else None


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a scorer for the rows of a part, and for which of the rows they hold already."""

    scoring: Scoring
    columns: dict[str, list[Value]]
    holds: Sequence[bool]

    def forget_changed(self, places: range) -> bool:
        """Whether some of these rows have changed; then the values of all of them are null."""
        if all(self.holds[place] for place in places):
            return False
        for column in self.columns.values():
            column[places.start : places.stop] = [None] * len(places)
        return True

    def put(self, places: Sequence[int], given: Mapping[str, Sequence[Value]]) -> None:
        """Afterwards these rows have the values that were given."""
        self.scoring.made += len(places)
        for name, values in given.items():
            for place, value in zip(places, values, strict=True):
                self.columns[name][place] = value


def _keys(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    return zip(*(table.column(key).to_pylist() for key in KEYS), strict=True)


class Scoring:
    """The files of one scorer, as they come about."""

    def __init__(self, job: Job, scorer: Scorer, *, replacing: bool) -> None:
        self.scorer = scorer
        self._job = job
        self._parts: list[ScorePart] = []
        self._hash_column: str | None = getattr(scorer, "hash_column", None)
        self._hashes: list[pa.Table] = []
        self.made = self._written = self._scored = 0
        self._tallies = {name: _Tally() for name in scorer.columns}
        own = sorted(set(job.plan.record_schema.names) & set(scorer.columns))
        if own:
            raise UsageError(
                f"the scorer {scorer.name} has a column {own[0]}, and the dataset in {job.storage.url} has one of that "
                f"name, from its manifest; rename it there, and use a new --out"
            )
        self._empty = ScoreManifest(
            scorer=scorer.name,
            version=scorer.version,
            plan_hash=job.plan.plan_hash,
            columns=dict(scorer.columns),
            rows=0,
            parts=(),
        )
        self._replacing = replacing
        self._before = self._parts_before()
        self._digests = {part.path: part.sha256 for part in self._before}

    def _parts_before(self) -> tuple[ScorePart, ...]:
        """What the manifest that is there names, if it is of this version.

        Raises OutputConflictError if it is of another one, which is not to be replaced.
        """
        try:
            found = read_manifest(self._job.storage, self.scorer.name)
        except ValueError:
            return ()  # it is written anew
        if found is None:
            return ()
        if (found.version, found.columns) != (self._empty.version, self._empty.columns):
            if self._replacing:
                return ()
            raise OutputConflictError(
                f"{self._job.storage.url}/scores/{self.scorer.name} is of version {found.version}, and the scorer here "
                f"is of version {self.scorer.version}; use that one, or give --replace"
            )
        return found.parts

    def path(self, number: int, rows: pa.Table) -> str:
        """Where the part of these rows lies."""
        identity = [self._empty.version, self._empty.columns, rows.select(list(KEYS)).to_pydict()]
        return part_path(self.scorer.name, number, identity)

    def adopt(self, number: int, rows: pa.Table) -> bool:
        """Whether the part of these rows is there as it should be."""
        path = self.path(number, rows)
        try:
            data = self._job.storage.read(path, MAX_PART_BYTES)
            part = described(path, data, rows.num_rows)
            table = decode_part(data, self._empty.schema)
        except (FileNotFoundError, ForeignObjectError, ValueError):
            return False
        whole = table.select(list(KEYS)).equals(rows.select(list(KEYS)))
        if not whole or self._digests.get(path, part.sha256) != part.sha256:
            return False
        self._add(part, table)
        return True

    def values_before(self, number: int, rows: pa.Table) -> Values:
        """The values that the part of that number has for these rows now, as far as they still hold."""
        nothing = {name: list[Value]([None] * rows.num_rows) for name in self.scorer.columns}
        if number < len(self._before) and self._before[number].rows == rows.num_rows:
            try:
                table = read_part(self._job.storage, self._before[number], self._empty.schema)
            except ValueError:
                pass  # all of it is made anew
            else:
                values = {name: table.column(name).to_pylist() for name in self.scorer.columns}
                return Values(self, values, [one == now for one, now in zip(_keys(table), _keys(rows), strict=True)])
        return Values(self, nothing, [False] * rows.num_rows)

    def write(self, number: int, rows: pa.Table, values: Mapping[str, Sequence[Value]]) -> None:
        """Afterwards the part of these rows is there."""
        table = rows.select(list(KEYS)).replace_schema_metadata(None).combine_chunks()
        for name, kind in self._empty.fields.items():
            table = table.append_column(pa.field(name, kind), pa.array(values[name], kind))
        path, data = self.path(number, rows), encode_part(table)
        self._job.storage.write(path, data)
        self._written += 1
        self._add(described(path, data, rows.num_rows), table)

    def _add(self, part: ScorePart, table: pa.Table) -> None:
        self._parts.append(part)
        for name, tally in self._tallies.items():
            tally.add(table.column(name))
        if self._hash_column is not None:
            self._hashes.append(table.select(["sample_id", self._hash_column]).drop_null())
        self._scored += table.num_rows - min(table.column(name).null_count for name in self.scorer.columns)

    def finish(self, distance: int) -> ScorerSummary:
        """Afterwards the manifest names all parts, and no other part of this scorer is left."""
        rows = sum(part.rows for part in self._parts)
        manifest = replace(self._empty, rows=rows, parts=tuple(self._parts))
        self._parts_before()  # another version may have come meanwhile
        self._job.storage.write(manifest_path(self.scorer.name), manifest.to_json())
        delete_unnamed(self._job.storage, manifest)
        return ScorerSummary(
            name=self.scorer.name,
            version=self.scorer.version,
            rows=rows,
            scored=self._scored,
            parts=len(self._parts),
            written=self._written,
            made=self.made,
            columns={name: tally.ends for name, tally in self._tallies.items()},
            duplicates=self._duplicates(distance),
        )

    def _duplicates(self, distance: int) -> Duplicates | None:
        """What looks alike by the scorer's hashes, if it has any."""
        if not self._hashes:
            return None
        found = pa.concat_tables(self._hashes)
        try:
            samples, hashes = (column.to_pylist() for column in found.columns)
            return find_duplicates(samples, hashes, distance)
        except ValueError as error:
            raise JobError(f"the scorer {self.scorer.name} cannot be searched for duplicates: {error}") from error
