"""The rows of a published dataset, and which of them are exported."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.jobs.errors import JobError
from latentmill.jobs.exports.filters import parse_filter
from latentmill.jobs.exports.spec import ExportSpec
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.picture_store import LostPictureError
from latentmill.jobs.outputs.publish import MAX_PART_BYTES, Part, Publication, known_rows, standing_publication
from latentmill.jobs.plans.planned import fingerprint
from latentmill.jobs.scores.join import open_scores
from latentmill.jobs.store.parquet import OversizeError, read_parquet


class Source:
    """A published dataset to export from. Memory holds two of its parts at a time; safe to use from several threads."""

    def __init__(self, job: Job, publication: Publication) -> None:
        self.job = job
        self.publication = publication
        self._own = job.plan.record_schema.remove_metadata()
        self._scores = open_scores(job.storage, publication.plan_hash, self._own.names)
        self._lock = Lock()
        self._part = lru_cache(maxsize=2)(self._read_part)

    @property
    def digest(self) -> str:
        """One digest of all published rows and their scores."""
        return fingerprint([*(part.sha256 for part in self.publication.parts), *self._scores.digests])

    @property
    def schema(self) -> pa.Schema:
        """The columns of the tables."""
        return pa.schema([*self._own, *self._scores.fields])

    def tables(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, pa.Table]]:
        """The rows from `start` to before `stop`, part by part, each with the number of its first row.

        Columns that other files hold for the same rows are joined here, and named by `schema`.
        """
        first = 0
        for part in self.publication.parts:
            low, high = max(first, start), min(first + part.rows, self.publication.rows if stop is None else stop)
            if low < high:
                with self._lock:
                    table = self._part(part)
                yield low, table.slice(low - first, high - low)
            first += part.rows

    def picture(self, row: Mapping[str, Any]) -> bytes:
        """The file of a row's picture, which has the digest of the row. Raises JobError otherwise."""
        storage = self.job.storage
        try:
            return self.job.pictures.read_row(row)
        except LostPictureError as error:
            raise JobError(
                f"{row['image']} in {storage.url} cannot be read: {error}; heal it by: latentmill repair {storage.url}"
            ) from error

    def _read_part(self, part: Part) -> pa.Table:
        url = self.job.storage.url
        try:
            data = self.job.storage.read(part.path, part.bytes)
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ValueError("it has not the sha256 that it was published with")
            rows = read_parquet(data, self._own.names, max_rows=part.rows, max_bytes=MAX_PART_BYTES)
            return self._scores.join(known_rows(self.job, rows))
        except (FileNotFoundError, pa.ArrowException, OversizeError, ValueError, KeyError) as error:
            raise JobError(f"{part.path} in {url} is damaged: {error}; heal it by: latentmill repair {url}") from error


def open_source(out_url: str) -> Source:
    """The dataset in an output. Raises JobError if it is not published as it is now."""
    job = open_job(out_url)
    publication = standing_publication(job)
    if publication is None:
        url = job.storage.url
        raise JobError(
            f"{url} has no published dataset, and only such are exported; `latentmill status {url}` shows how far it "
            f"is, and the same `latentmill run` command goes on with it"
        )
    return Source(job, publication)


class Selection:
    """Which rows are exported, and to which split each belongs: it follows from the row alone."""

    def __init__(self, spec: ExportSpec, schema: pa.Schema) -> None:
        self._statuses = pa.array(spec.status.split(","))
        self._filter = None if spec.filter is None else parse_filter(spec.filter, schema)
        self._shares = spec.splits

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """True for each row that has a picture, a status and what else was asked for."""
        kept = pc.and_(pc.is_valid(table.column("image")), pc.is_in(table.column("status"), self._statuses))
        if self._filter is not None:
            kept = pc.and_(kept, self._filter.mask(table))
        found: NDArray[np.bool_] = (
            kept.to_numpy(zero_copy_only=False) if isinstance(kept, pa.Array) else kept.to_numpy()
        )
        return found

    def splits(self, table: pa.Table) -> NDArray[np.object_]:
        """The name of each row's split. Rows of one row_id, which share a prompt, are in one split."""
        names = list(self._shares)
        if len(names) == 1:
            return np.full(table.num_rows, names[0], dtype=object)
        ends = np.cumsum(list(self._shares.values()))[:-1] * 2.0**64
        encoded = table.column("row_id").combine_chunks().dictionary_encode()
        row_ids: list[str] = encoded.dictionary.to_pylist()
        places = [int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8]) for row_id in row_ids]
        chosen = np.array([names[int(np.searchsorted(ends, place, side="right"))] for place in places], dtype=object)
        found: NDArray[np.object_] = chosen[encoded.indices.to_numpy()]
        return found

    def rows(self, table: pa.Table, split: str) -> pa.Table:
        """The rows of the table that are exported in that split."""
        return table.filter(pa.array(self.mask(table) & (self.splits(table) == split)))


def renamed(names: list[str], taken: Collection[str]) -> list[str]:
    """The names of columns where some are `taken`: such a column of the manifest gets the prefix `manifest_`."""
    used = {*names, *taken}
    found = []
    for name in names:
        new = name
        while new in taken or (new != name and new in used):
            new = f"manifest_{new}"
        used.add(new)
        found.append(new)
    return found
