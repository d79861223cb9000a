"""`latentmill score`: columns of scores beside a published dataset, whose own files stay as they are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.outputs.publish import Publication, read_columns, standing_publication
from latentmill.jobs.scores.duplicates import Duplicates, find_duplicates
from latentmill.jobs.scores.scorer import Scorer, Value, score_batch
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
)
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.scores.table import load_scorers
from latentmill.jobs.store.errors import ForeignObjectError

ROWS_PER_PART = 4096
BATCH = 16
"""Pictures that a scorer sees at once; two batches are in memory. Fixed, because a model's values may depend on it."""

_THREADS = 8
_COLUMNS = (*KEYS, "prompt", "status", "image", "bytes", "sha256", "width", "height")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreProgress:
    """How far it is, in rows of the dataset."""

    phase: str
    done: int
    total: int


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
    columns: Mapping[str, tuple[float, float, float] | None]
    """Each column, with its least, mean and greatest value; None where it has no numbers."""
    duplicates: Duplicates | None = None
    """Pictures that look alike, where the scorer has hashes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """What was scored."""

    out: str
    scorers: tuple[ScorerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def score(
    out_url: str,
    names: Sequence[str],
    spec: ScoreSpec,
    *,
    rows_per_part: int = ROWS_PER_PART,
    on_progress: Callable[[ScoreProgress], None] = lambda _: None,
) -> ScoreSummary:
    """Afterwards the scores of these scorers lie beside the dataset, a row for each of its rows, in order.

    Parts that are there as they should be are left alone; a picture is read once for all scorers that need it. Raises
    UsageError for an unknown scorer, OutputConflictError for one with scores of another version there, JobError if the
    dataset is not published, or a picture is not as its row says.
    """
    job = open_job(out_url)
    publication = standing_publication(job)
    if publication is None:
        url = job.storage.url
        raise JobError(
            f"{url} has no published dataset, and only such are scored; `latentmill status {url}` shows how far it is, "
            f"and the same `latentmill run` command goes on with it"
        )
    scorings = [_Scoring(job, scorer, replacing=spec.replace) for scorer in load_scorers(names, spec)]
    done = 0

    def show(place: int) -> None:
        on_progress(ScoreProgress(phase="scoring", done=done + place, total=publication.rows))

    for number, rows in enumerate(_slices(job, publication, rows_per_part)):
        show(0)
        open_ones = [scoring for scoring in scorings if not scoring.adopt(number, rows)]
        if open_ones:
            for scoring, values in zip(open_ones, _score_rows(job, rows, open_ones, show), strict=True):
                scoring.write(number, rows, values)
        done += rows.num_rows
    show(0)
    return ScoreSummary(out=job.storage.url, scorers=tuple(scoring.finish(spec.distance) for scoring in scorings))


def _score_rows(
    job: Job, rows: pa.Table, scorings: Sequence[_Scoring], show: Callable[[int], None]
) -> list[dict[str, list[Value]]]:
    """For each scorer the values of its columns, null for rows without a picture that is worth one.

    A blank picture, in place of a flagged one, is not: it would say nothing of what was drawn. `show` is told how many
    rows are done.
    """
    kept = job.plan.settings.on_flagged == "keep"
    found: list[dict[str, list[Value]]] = [
        {name: [None] * rows.num_rows for name in scoring.scorer.columns} for scoring in scorings
    ]
    pictured = [
        (place, row)
        for place, row in enumerate(rows.to_pylist())
        if row["image"] is not None and (row["status"] == "ok" or kept)
    ]
    batches = [pictured[start : start + BATCH] for start in range(0, len(pictured), BATCH)]
    with ThreadPoolExecutor(_THREADS) as pool:
        reading = [pool.submit(_read_picture, job, row) for _, row in batches[0]] if batches else []
        for batch, after in zip(batches, [*batches[1:], []], strict=False):
            pictures = [future.result() for future in reading]
            reading = [pool.submit(_read_picture, job, row) for _, row in after]
            for scoring, columns in zip(scorings, found, strict=True):
                given = score_batch(scoring.scorer, pictures, [row["prompt"] for _, row in batch])
                for name, values in given.items():
                    for (place, _), value in zip(batch, values, strict=True):
                        columns[name][place] = value
            show(batch[-1][0] + 1)
    return found


def _read_picture(job: Job, row: Mapping[str, Any]) -> Pixels:
    """The pixels of a row's picture, whose file has the digest of the row. Raises JobError otherwise."""
    url = job.storage.url
    try:
        data = job.pictures.read(row["image"], row["bytes"] or 0)
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ValueError("it has not the sha256 of its row")
        return decode_png(data, (row["width"], row["height"]))
    except (FileNotFoundError, ForeignObjectError, ValueError) as error:
        why = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise JobError(
            f"{row['image']} in {url} cannot be scored: {why}; heal it by: latentmill repair {url}"
        ) from error


def _slices(job: Job, publication: Publication, rows_per_part: int) -> Iterator[pa.Table]:
    for part in publication.parts:
        try:
            table = read_columns(job, part, _COLUMNS)
        except FileNotFoundError as error:
            url = job.storage.url
            raise JobError(
                f"{part.path} in {url} is gone: it was published anew meanwhile, or lost; run the same command again, "
                f"or heal it by: latentmill repair {url}"
            ) from error
        for start in range(0, table.num_rows, rows_per_part):
            yield table.slice(start, rows_per_part)


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


class _Scoring:
    """The files of one scorer, as they come about."""

    def __init__(self, job: Job, scorer: Scorer, *, replacing: bool) -> None:
        self.scorer = scorer
        self._job = job
        self._parts: list[ScorePart] = []
        self._hash_column: str | None = getattr(scorer, "hash_column", None)
        self._hashes: list[pa.Table] = []
        self._written = self._scored = 0
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
        self._digests = {part.path: part.sha256 for part in self._parts_before()}

    def _parts_before(self) -> tuple[ScorePart, ...]:
        """What the manifest that is there names. Raises OutputConflictError if it is of another version."""
        try:
            found = read_manifest(self._job.storage, self.scorer.name)
        except ValueError:
            return ()  # it is written anew
        if found is None:
            return ()
        if not self._replacing and (found.version, found.columns) != (self._empty.version, self._empty.columns):
            raise OutputConflictError(
                f"{self._job.storage.url}/scores/{self.scorer.name} is of version {found.version}, and the scorer here "
                f"is of version {self.scorer.version}; use that one, or give --replace"
            )
        return found.parts

    def _path(self, number: int, rows: pa.Table) -> str:
        identity = [self._empty.version, self._empty.columns, rows.select(list(KEYS)).to_pydict()]
        return part_path(self.scorer.name, number, identity)

    def adopt(self, number: int, rows: pa.Table) -> bool:
        """Whether the part of these rows is there as it should be."""
        path = self._path(number, rows)
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

    def write(self, number: int, rows: pa.Table, values: Mapping[str, Sequence[Value]]) -> None:
        """Afterwards the part of these rows is there."""
        table = rows.select(list(KEYS)).replace_schema_metadata(None).combine_chunks()
        for name, kind in self._empty.fields.items():
            table = table.append_column(pa.field(name, kind), pa.array(values[name], kind))
        path, data = self._path(number, rows), encode_part(table)
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
