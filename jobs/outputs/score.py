"""`latentmill score`: columns of scores beside a published dataset, whose own files stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors.ray_tasks import run_tasks
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.picture_store import LostPictureError
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.outputs.publish import Part, Publication, read_columns, standing_publication
from latentmill.jobs.outputs.score_parts import ScorerSummary, Scoring
from latentmill.jobs.scores.scorer import Value, score_batch
from latentmill.jobs.scores.side_files import FOLDER, KEYS
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.scores.table import load_scorers
from latentmill.jobs.store.urls import shared_url

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

    Parts that are there as they should be are left alone, and of others the rows whose pixels are still the same; a
    picture is read once for all scorers that need it. Raises UsageError for an unknown scorer, OutputConflictError for
    one with scores of another version there, JobError if the dataset is not published, or a picture is not as its row
    says.
    """
    here = replace(spec, device="cpu") if spec.executor == "ray" else spec  # the nodes' device may be none of this one
    work = _open_work(out_url, tuple(names), here, rows_per_part)
    total, done = work.publication.rows, 0
    if spec.executor == "ray":
        _score_on_ray(work, names, spec, rows_per_part, on_progress)

    def show(place: int) -> None:
        on_progress(ScoreProgress(phase="scoring", done=done + place, total=total))

    for number in range(len(work.slices)):
        show(0)
        done += work.score_part(number, show)
    show(0)
    return ScoreSummary(
        out=work.job.storage.url, scorers=tuple(scoring.finish(spec.distance) for scoring in work.scorings)
    )


@lru_cache(maxsize=1)
def _opened(out_url: str, names: tuple[str, ...], spec: ScoreSpec, rows_per_part: int) -> _Work:
    """The same for every part that this process scores: models are loaded once."""
    return _open_work(out_url, names, spec, rows_per_part)


def _open_work(out_url: str, names: tuple[str, ...], spec: ScoreSpec, rows_per_part: int) -> _Work:
    """What is to be scored. Raises as `score` does."""
    job = open_job(out_url)
    publication = standing_publication(job)
    if publication is None:
        url = job.storage.url
        raise JobError(
            f"{url} has no published dataset, and only such are scored; `latentmill status {url}` shows how far it is, "
            f"and the same `latentmill run` command goes on with it"
        )
    scorings = [Scoring(job, scorer, replacing=spec.replace) for scorer in load_scorers(names, spec)]
    return _Work(job, publication, scorings, rows_per_part)


def _score_on_ray(
    work: _Work,
    names: Sequence[str],
    spec: ScoreSpec,
    rows_per_part: int,
    on_progress: Callable[[ScoreProgress], None],
) -> None:
    """Afterwards every part is there: those that are missing are written by tasks of a cluster, whose nodes reach it.

    Each process there loads the scorers once. The parts are the same as if they were written here.
    """
    there = {path for path, _ in work.job.storage.list(FOLDER)}
    missing = [number for number in range(len(work.slices)) if not work.is_there(number, there)]
    total = work.publication.rows
    done = total - sum(work.slices[number][2] for number in missing)
    on_progress(ScoreProgress(phase="scoring on Ray", done=done, total=total))
    call = partial(_score_there, shared_url(work.job.url, here="threads"), tuple(names), spec, rows_per_part)
    on_device = any(getattr(scoring.scorer, "on_device", False) for scoring in work.scorings)
    on_gpus = on_device and spec.device != "cpu"
    for rows in run_tasks(
        call,
        missing,
        at_once=spec.workers,
        address=spec.address,
        insecure=spec.insecure_ray,
        gpus=None if on_gpus and spec.device == "auto" else int(on_gpus),
    ):
        done += rows
        on_progress(ScoreProgress(phase="scoring on Ray", done=done, total=total))


def _score_there(out_url: str, names: tuple[str, ...], spec: ScoreSpec, rows_per_part: int, number: int) -> int:
    """Afterwards that part is there. Returns its rows."""
    return _opened(out_url, names, spec, rows_per_part).score_part(number, lambda _: None)


class _Work:
    """A dataset and its scorers. `slices` are the parts of scores: a part of the dataset, the first row in it, rows."""

    def __init__(self, job: Job, publication: Publication, scorings: Sequence[Scoring], rows_per_part: int) -> None:
        self.job = job
        self.publication = publication
        self.scorings = scorings
        self.slices = [
            (part, start, min(rows_per_part, part.rows - start))
            for part in publication.parts
            for start in range(0, part.rows, rows_per_part)
        ]
        self._read = lru_cache(maxsize=1)(self._read_part)

    def score_part(self, number: int, show: Callable[[int], None]) -> int:
        """Afterwards that part of each scorer is there. Returns its rows; `show` is told how many are done."""
        rows = self._rows(number)
        open_ones = [scoring for scoring in self.scorings if not scoring.adopt(number, rows)]
        for scoring, values in zip(open_ones, _score_rows(self.job, number, rows, open_ones, show), strict=True):
            scoring.write(number, rows, values)
        return self.slices[number][2]

    def is_there(self, number: int, paths: Collection[str]) -> bool:
        """Whether that part of every scorer is among these objects."""
        rows = self._rows(number)
        return all(scoring.path(number, rows) in paths for scoring in self.scorings)

    def _rows(self, number: int) -> pa.Table:
        part, start, count = self.slices[number]
        return self._read(part).slice(start, count)

    def _read_part(self, part: Part) -> pa.Table:
        try:
            return read_columns(self.job, part, _COLUMNS)
        except FileNotFoundError as error:
            url = self.job.storage.url
            raise JobError(
                f"{part.path} in {url} is gone: it was published anew meanwhile, or lost; run the same command again, "
                f"or heal it by: latentmill repair {url}"
            ) from error


def _score_rows(
    job: Job, number: int, rows: pa.Table, scorings: Sequence[Scoring], show: Callable[[int], None]
) -> list[dict[str, list[Value]]]:
    """For each scorer the values of its columns, null for rows without a picture that is worth one.

    A blank picture, in place of a flagged one, is not: it would say nothing of what was drawn. Batches are cut at the
    same rows whatever has a picture, and one of rows that have not changed since they were scored keeps its values.
    """
    kept = job.plan.settings.on_flagged == "keep"
    listed = rows.to_pylist()
    found = [scoring.values_before(number, rows) for scoring in scorings]
    batches = []
    for start in range(0, rows.num_rows, BATCH):
        those = range(start, min(start + BATCH, rows.num_rows))
        changed = [values for values in found if values.forget_changed(those)]
        pictured = [
            place for place in those if listed[place]["image"] is not None and (listed[place]["status"] == "ok" or kept)
        ]
        if changed and pictured:
            batches.append((changed, pictured))
    with ThreadPoolExecutor(_THREADS) as pool:

        def read(places: Sequence[int]) -> list[Future[Pixels]]:
            return [pool.submit(_read_picture, job, listed[place]) for place in places]

        reading = read(batches[0][1]) if batches else []
        for (changed, places), (_, after) in zip(batches, [*batches[1:], ([], [])], strict=False):
            pictures = [future.result() for future in reading]
            reading = read(after)
            for values in changed:
                prompts = [listed[place]["prompt"] for place in places]
                values.put(places, score_batch(values.scoring.scorer, pictures, prompts))
            show(places[-1] + 1)
    return [values.columns for values in found]


def _read_picture(job: Job, row: Mapping[str, Any]) -> Pixels:
    """The pixels of a row's picture, whose file has the digest of the row. Raises JobError otherwise."""
    url = job.storage.url
    try:
        return decode_png(job.pictures.read_row(row), (row["width"], row["height"]))
    except (LostPictureError, ValueError) as error:
        raise JobError(
            f"{row['image']} in {url} cannot be scored: {error}; heal it by: latentmill repair {url}"
        ) from error
