"""Single rows of an output, found by the number of their sample: in what is published, or in the ledger before that."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.job import Job
from latentmill.jobs.outputs.publish import Publication, read_columns, standing_publication

Row = Mapping[str, Any]


def rows_of(job: Job, samples: Collection[int]) -> dict[int, Row]:
    """The rows of these samples. Raises UsageError for a number that the plan lacks, or that is not committed yet."""
    beyond = sorted(sample for sample in samples if not 0 <= sample < job.plan.n_samples)
    if beyond:
        raise UsageError(
            f"{job.storage.url} has no sample {beyond[0]}; its samples are 0 to {job.plan.n_samples - 1:,}, as the "
            f"column sample_id says"
        )
    publication = standing_publication(job)
    found = _committed(job, samples) if publication is None else _published(job, publication, samples)
    missing = sorted(set(samples) - found.keys())
    if missing:
        raise UsageError(
            f"sample {missing[0]} is not in {job.storage.url} yet; `latentmill status {job.storage.url}` shows how far "
            f"it is"
        )
    return found


def draw_samples(job: Job, count: int, seed: int) -> list[int]:
    """Numbers of `count` samples that have a picture, drawn by `seed` from what is published: the same ones each time.

    Raises JobError if nothing is published.
    """
    publication = standing_publication(job)
    if publication is None:
        raise JobError(
            f"samples are drawn from a published dataset, and {job.storage.url} has none; `latentmill status "
            f"{job.storage.url}` shows how far it is"
        )
    chosen = random.Random(seed).sample(range(publication.images), min(count, publication.images))  # noqa: S311
    wanted, samples, before, first = np.sort(np.array(chosen, dtype=np.int64)), list[int](), 0, 0
    for part in publication.parts:
        places = np.flatnonzero(read_columns(job, part, ["image"]).column("image").is_valid().to_numpy())
        inside = wanted[(wanted >= before) & (wanted < before + len(places))] - before
        samples += (places[inside] + first).tolist()
        before, first = before + len(places), first + part.rows
    return samples


def _published(job: Job, publication: Publication, samples: Collection[int]) -> dict[int, Row]:
    names = [name for name, _ in publication.schema]
    found, first = dict[int, Row](), 0
    for part in publication.parts:
        here = [sample for sample in samples if first <= sample < first + part.rows]
        if here:
            rows = read_columns(job, part, names).take([sample - first for sample in here]).to_pylist()
            found |= {sample: row for sample, row in zip(here, rows, strict=True) if _is_of(row, sample)}
        first += part.rows
    return found


def _committed(job: Job, samples: Collection[int]) -> dict[int, Row]:
    """Before there is a dataset: record after record, until all are found."""
    found, listing, wanted = dict[int, Row](), job.ledger.listing(), set(samples)
    for chunk in np.flatnonzero(listing.committed).tolist():
        if not wanted - found.keys():
            break
        record = job.ledger.effective(chunk, listing.repairs.get(chunk, 0))
        if record is None:
            continue
        ids = record.table.column("sample_id").to_pylist()
        here = {place: int(name) for place, name in enumerate(ids) if name.isdecimal() and int(name) in wanted}
        rows = record.table.take(pa.array(list(here), pa.int64())).to_pylist()
        found |= dict(zip(here.values(), rows, strict=True))
    return found


def _is_of(row: Row, sample: int) -> bool:
    return str(row["sample_id"]).isdecimal() and int(row["sample_id"]) == sample
