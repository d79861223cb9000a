"""Scores as columns of the rows that they are of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentmill.jobs.errors import JobError
from latentmill.jobs.plans.planned import fingerprint
from latentmill.jobs.scores.side_files import ScoreManifest, read_manifest, read_part, scored_names
from latentmill.jobs.store.storage import Storage


class Scores:
    """All scores of a dataset, to be joined to its rows. Memory holds two parts of each scorer; safe to share."""

    def __init__(self, storage: Storage, manifests: Sequence[ScoreManifest]) -> None:
        self._joins = [_Join(storage, manifest) for manifest in manifests]
        self.fields = [pa.field(*column) for manifest in manifests for column in manifest.fields.items()]

    @property
    def digests(self) -> list[str]:
        """A digest of the scores of each scorer."""
        return [join.digest for join in self._joins]

    def join(self, table: pa.Table) -> pa.Table:
        """The table, any rows of the dataset in any order, with the columns of all scorers.

        It needs sample_id and pixel_sha256. A value is null where the scorer gave none, and where the picture was made
        again after it was scored. Raises JobError if scores are not as they were written.
        """
        for scorer in self._joins:
            table = scorer.join(table)
        return table


def open_scores(storage: Storage, plan_hash: str, taken: Collection[str] = ()) -> Scores:
    """The scores beside the dataset of that plan, whose columns are `taken`. Raises JobError if they are damaged."""
    manifests = []
    for name in scored_names(storage):
        try:
            manifest = read_manifest(storage, name)
            if manifest is None:
                continue  # it was removed just now
            if manifest.plan_hash != plan_hash:
                raise ValueError("it is of another plan's dataset")
            both = sorted(set(manifest.columns) & set(taken))
            if both:
                raise ValueError(f"the dataset has a column {both[0]} of its own")
        except ValueError as error:
            raise JobError(_damaged(storage, name, str(error))) from error
        manifests.append(manifest)
    return Scores(storage, manifests)


class _Join:
    """The scores of one scorer."""

    def __init__(self, storage: Storage, manifest: ScoreManifest) -> None:
        self._storage = storage
        self._manifest = manifest
        self._ends = np.array(list(accumulate(part.rows for part in manifest.parts)), dtype=np.int64)
        self._read = lru_cache(maxsize=2)(self._read_part)

    @property
    def digest(self) -> str:
        return fingerprint([self._manifest.version, *(part.sha256 for part in self._manifest.parts)])

    def join(self, table: pa.Table) -> pa.Table:
        ordinals = _ordinals(self._storage, table)
        parts = np.searchsorted(self._ends, ordinals, side="right")
        needed = [int(part) for part in np.unique(parts)]
        if needed and (needed[-1] == len(self._ends) or ordinals.min() < 0):
            raise JobError(_damaged(self._storage, self._manifest.scorer, "it has not all rows"))
        starts = np.zeros(len(self._ends) + 1, dtype=np.int64)  # of each part's rows among those that are read
        starts[[part + 1 for part in needed]] = [self._manifest.parts[part].rows for part in needed]
        starts = np.cumsum(starts)[:-1]
        first = self._ends - [part.rows for part in self._manifest.parts]
        scores = pa.concat_tables([self._manifest.schema.empty_table(), *map(self._read, needed)])
        scores = scores.take(pa.array(ordinals - first[parts] + starts[parts])) if needed else scores
        if not scores.column("sample_id").equals(table.column("sample_id")):
            raise JobError(_damaged(self._storage, self._manifest.scorer, "its rows are not in order"))
        same = pc.equal(scores.column("pixel_sha256"), table.column("pixel_sha256"))
        for name, kind in self._manifest.fields.items():
            values = pc.if_else(pc.fill_null(same, False), scores.column(name), pa.scalar(None, kind))  # noqa: FBT003 - a value
            table = table.append_column(name, values)
        return table

    def _read_part(self, number: int) -> pa.Table:
        try:
            return read_part(self._storage, self._manifest.parts[number], self._manifest.schema)
        except ValueError as error:
            raise JobError(_damaged(self._storage, self._manifest.scorer, str(error))) from error


def _ordinals(storage: Storage, table: pa.Table) -> NDArray[np.int64]:
    """The numbers of the samples. Raises JobError for rows that no job writes."""
    try:
        numbers = pc.cast(table.column("sample_id"), pa.int64())
    except pa.ArrowInvalid:
        numbers = None
    if numbers is None or numbers.null_count:
        raise JobError(
            f"{storage.url}/dataset has a row whose sample_id no job writes; `latentmill verify {storage.url}` says "
            f"what is wrong with it"
        )
    ordinals: NDArray[np.int64] = numbers.to_numpy()
    return ordinals


def _damaged(storage: Storage, name: str, why: str) -> str:
    return f"scores/{name} in {storage.url} is damaged: {why}; heal it by: latentmill score {storage.url} --with {name}"
