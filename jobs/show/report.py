"""What a person looks at: contact sheets of a published dataset, and the gallery of any output, finished or not."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.exports.rows import Source
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.manifests.axes import joined_axis
from latentmill.jobs.outputs.publish import Publication, load_publication, read_columns
from latentmill.jobs.show.fonts import Lettering
from latentmill.jobs.show.gallery import REPORT_PREFIX, CommittedRows, Gallery, GallerySummary, PublishedRows
from latentmill.jobs.show.sheet_pages import PICTURE_FIELDS, named, plan_sheets
from latentmill.jobs.show.sheets import Sheet, draw_sheet
from latentmill.jobs.store.errors import StorageError

_SHEET = re.compile(rf"{REPORT_PREFIX}/sheet-\d{{4,}}\.png", re.ASCII)
MAX_SHEETS = 20
MAX_PICTURES = 100_000
THUMBNAIL = 256
LIVE_SECONDS = 10.0
_BATCH_ROWS = 2048
_FIELDS = ["sample_id", "prompt", "seed", "status", "error", "nsfw_score", *PICTURE_FIELDS]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportProgress:
    """How far it is: pictures of the gallery, or contact sheets."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSummary:
    """What was written under `out`: the gallery's page; the sheets' paths, how many samples are on them, and how many
    of their pictures could not be read because they are lost or altered.
    """

    out: str
    gallery: GallerySummary
    sheets: tuple[str, ...]
    samples_shown: int
    samples: int
    unreadable: int = 0
    without_glyph: str = ""
    """Characters of labels that no font of this machine has: the sheets have a box for each."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def report(
    out_url: str,
    *,
    max_sheets: int = MAX_SHEETS,
    max_pictures: int = MAX_PICTURES,
    thumbnail: int = THUMBNAIL,
    live: bool = False,
    font: str | None = None,
    on_progress: Callable[[ReportProgress], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> ReportSummary:
    """Afterwards OUT/report holds the gallery as the output is now, its contact sheets, and none of an earlier report.

    Sheets are drawn of a published dataset only, the gallery of what is committed as well. With `live` it is written
    again and again until the dataset is published. Memory holds the rows of the gallery, or of one part if published,
    the labels of `max_sheets` pages, and one page's pictures. `font` is a file for labels; without it, the fonts of
    this machine serve. Raises UsageError if the output has no plan.
    """
    _check(max_sheets, max_pictures, thumbnail)
    lettering = Lettering(font_file=font)
    job = open_job(out_url)
    gallery = Gallery(job=job, side=thumbnail, limit=max_pictures)
    pictures = _Counter(min(max_pictures, job.plan.n_samples), on_progress)
    publication = load_publication(job)
    if publication is None:
        committed = CommittedRows(job, max_pictures)
        written = gallery.write(committed, live=live, on_pictures=pictures)
        try:
            while live and publication is None:
                sleep(LIVE_SECONDS)
                publication = load_publication(job)
                if publication is None:
                    written = gallery.write(committed, live=True, on_pictures=pictures)
        finally:  # also when it is interrupted: a page that is open then stops to look for what nobody writes
            if live:
                gallery.end()
    if publication is None:
        return ReportSummary(out=job.storage.url, gallery=written, sheets=(), samples_shown=0, samples=written.samples)
    pictures.done = 0
    written = gallery.write(PublishedRows(Source(job, publication), max_pictures), live=False, on_pictures=pictures)
    return _draw_sheets(job, publication, written, max_sheets, lettering, on_progress)


class _Counter:
    """How many pictures are done."""

    def __init__(self, total: int, on_progress: Callable[[ReportProgress], None]) -> None:
        self.done = 0
        self._total = total
        self._on_progress = on_progress

    def __call__(self, more: int) -> None:
        self.done += more
        self._on_progress(ReportProgress(phase="pictures", done=min(self.done, self._total), total=self._total))


def _check(max_sheets: int, max_pictures: int, thumbnail: int) -> None:
    if max_sheets < 0:
        raise UsageError(f"max_sheets is {max_sheets}; give 0 for none, or how many at most")
    if max_pictures < 1:
        raise UsageError(f"max_pictures is {max_pictures}; give at least 1")
    if not 32 <= thumbnail <= 1024:
        raise UsageError(f"thumbnail is {thumbnail}; give 32 to 1024 pixels")


def _draw_sheets(
    job: Job,
    publication: Publication,
    gallery: GallerySummary,
    max_sheets: int,
    lettering: Lettering,
    on_progress: Callable[[ReportProgress], None],
) -> ReportSummary:
    rows = _rows(job, publication)
    sheets: list[Sheet] = []
    if max_sheets:
        axes = tuple(joined_axis(dimension, named) for dimension in job.plan.shown_dimensions)
        sheets = plan_sheets(rows, job.plan.images_per_row(), axes, max_sheets, lettering)
    paths = tuple(f"{REPORT_PREFIX}/sheet-{number:04d}.png" for number in range(1, len(sheets) + 1))
    unreadable: set[str] = set()

    def read_pixels(row: Mapping[str, Any]) -> Pixels | None:
        pixels = _pixels(job, row)
        if pixels is None:
            unreadable.add(row["image"])
        return pixels

    for number, (path, sheet) in enumerate(zip(paths, sheets, strict=True), start=1):
        buffer = io.BytesIO()
        draw_sheet(sheet, read_pixels, lettering=lettering).save(buffer, "PNG")
        job.storage.write(path, buffer.getvalue())
        on_progress(ReportProgress(phase="contact sheets", done=number, total=len(sheets)))
    for path, _ in list(job.storage.list(REPORT_PREFIX)):
        if _SHEET.fullmatch(path) and path not in paths:
            job.storage.delete(path)
    return ReportSummary(
        out=job.storage.url,
        gallery=gallery,
        sheets=paths,
        samples_shown=sum(len(sheet.cells) for sheet in sheets),
        samples=publication.rows,
        unreadable=len(unreadable),
        without_glyph="".join(sorted(lettering.missing)),
    )


def _rows(job: Job, publication: Publication) -> Iterator[dict[str, Any]]:
    """The published rows in order of sample_id, a few thousand in memory at a time."""
    for part in publication.parts:
        try:
            rows = read_columns(job, part, _FIELDS)
        except FileNotFoundError as error:
            raise JobError(
                f"{part.path} in {job.storage.url} is missing; heal it by: latentmill repair {job.storage.url}"
            ) from error
        for batch in rows.to_batches(_BATCH_ROWS):
            yield from batch.to_pylist()


def _pixels(job: Job, row: Mapping[str, Any]) -> Pixels | None:
    """The pixels of a row's picture; None if that is lost or not as it was written."""
    try:
        return decode_png(job.pictures.read_row(row), (row["width"], row["height"]))
    except ValueError:
        return None
    except StorageError as error:
        if error.transient:
            raise
        return None  # for example, a folder has its name
