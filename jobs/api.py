"""latentmill from Python, for notebooks and scripts: plan, run, and read datasets, in the words of the flags."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.job_file import resolve
from latentmill.jobs.ledger.picture_store import LostPictureError
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.outputs.publish import Part, Publication, read_columns, standing_publication
from latentmill.jobs.plans.plan import draft_plan
from latentmill.jobs.plans.summary import PlanSummary
from latentmill.jobs.progress import Progress
from latentmill.jobs.runner import RunSummary, run_job
from latentmill.jobs.scores.join import open_scores
from latentmill.jobs.scores.side_files import KEYS
from latentmill.jobs.spec import JobSpec

if TYPE_CHECKING:
    from PIL.Image import Image


def plan(prompts: str | Sequence[str] = (), *, config: str | None = None, **settings: Any) -> PlanSummary:
    """What a run would do, in numbers. Writes nothing. Raises UsageError for a job that cannot run."""
    with draft_plan(_spec(prompts, config, settings)) as draft:
        return draft.summary()


def run(
    prompts: str | Sequence[str] = (),
    *,
    config: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **settings: Any,
) -> RunSummary:
    """Make the dataset, or go on with it. The summary has the exit code of `latentmill run`.

    Raises JobError, as the command says it in one line, for what ends a run before its dataset is published.
    """
    return run_job(_spec(prompts, config, settings), on_progress=on_progress)


def open_dataset(out: str) -> Dataset:
    """A published dataset, to read. Raises JobError if the output at this path or URL has none, or not yet."""
    job = open_job(out)
    publication = standing_publication(job)
    if publication is None:
        raise JobError(
            f"{job.storage.url} has no whole dataset; `latentmill status {job.storage.url}` shows how far it is, and "
            f"the same `latentmill run` command goes on with it"
        )
    return Dataset(job, publication)


class Dataset:
    """The rows of a published dataset, in order of sample_id, and their pictures. Memory holds one part at a time.

    Columns that `latentmill score` had added when it was opened are the last ones of a row.
    """

    def __init__(self, job: Job, publication: Publication) -> None:
        self._job = job
        self._publication = publication
        self._own_columns = [name for name, _ in publication.schema]
        self._scores = open_scores(job.storage, publication.plan_hash, self._own_columns)
        self._ends = list(accumulate(part.rows for part in publication.parts))
        self._read = lru_cache(maxsize=1)(self._read_part)

    def __len__(self) -> int:
        return self._publication.rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row by its place; negative numbers count from the end."""
        place = range(len(self))[number]
        index = bisect_right(self._ends, place)
        part = self._publication.parts[index]
        row: dict[str, Any] = self._read(part).slice(place - (self._ends[index] - part.rows), 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self._publication.parts:
            for batch in self._read(part).to_batches(1000):
                yield from batch.to_pylist()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many rows are `ok`, `flagged` and `failed`."""
        return self._publication.counts

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, or some of their columns, as one Arrow table."""
        names = self._columns if columns is None else columns
        return pa.concat_tables(self._read_part(part, names) for part in self._publication.parts)

    def image(self, row: Mapping[str, Any] | int) -> Image:
        """The picture of a row, or of the row at that place. Raises JobError if it has none, or it cannot be read."""
        from PIL import Image

        if isinstance(row, int):
            row = self[row]
        if row["image"] is None:
            raise JobError(f"sample {row['sample_id']} has no picture: it is {row['status']} ({row['error']})")
        try:
            data = self._job.pictures.read_row(row)
            return Image.fromarray(decode_png(data, (row["width"], row["height"])))
        except (LostPictureError, ValueError) as error:
            url = self._job.storage.url
            raise JobError(
                f"{row['image']} in {url} cannot be read: {error}; heal it by: latentmill repair {url}"
            ) from error

    @property
    def _columns(self) -> list[str]:
        return [*self._own_columns, *(field.name for field in self._scores.fields)]

    def _read_part(self, part: Part, names: Sequence[str] | None = None) -> pa.Table:
        wanted = list(self._columns if names is None else names)
        scored = {field.name for field in self._scores.fields}
        own = [name for name in wanted if name not in scored]
        if len(own) == len(wanted):
            return read_columns(self._job, part, wanted)
        return self._scores.join(read_columns(self._job, part, list(dict.fromkeys([*own, *KEYS])))).select(wanted)


def _spec(prompts: str | Sequence[str], config: str | None, settings: Mapping[str, Any]) -> JobSpec:
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    return resolve(config, {**settings, "prompts": given})
