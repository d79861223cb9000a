"""What can be wrong with the scores beside a dataset."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.outputs.defects import Defect, lasting
from latentmill.jobs.outputs.publish import Publication, read_columns
from latentmill.jobs.scores.side_files import KEYS, ScoreManifest, manifest_path, read_manifest, read_part, scored_names


def score_defects(job: Job, publication: Publication) -> Iterator[Defect]:
    """All scores have every row of the publication once, in order, made from the pixels that it has now.

    Without a manifest nothing counts as scored. Raises JobError or FileNotFoundError if the publication is damaged.
    """
    for name in scored_names(job.storage):
        path = manifest_path(name)
        try:
            manifest = read_manifest(job.storage, name)
        except (ValueError, JobError) as error:
            yield _defect(path, lasting(error))
            continue
        if manifest is None:
            continue  # it was removed just now
        both = sorted(set(manifest.columns) & {column for column, _ in publication.schema})
        if manifest.plan_hash != publication.plan_hash:
            yield _defect(path, "it is of another plan's dataset")
        elif both:
            yield _defect(path, f"the dataset has a column {both[0]} of its own")
        elif manifest.rows != publication.rows:
            yield _defect(path, f"it has {manifest.rows:,} rows, the dataset {publication.rows:,}")
        else:
            yield from _part_defects(job, publication, manifest)


def _part_defects(job: Job, publication: Publication, manifest: ScoreManifest) -> Iterator[Defect]:
    tables = (read_columns(job, part, KEYS).select(list(KEYS)) for part in publication.parts)
    rest = manifest.schema.empty_table().select(list(KEYS))
    for part in manifest.parts:
        while rest.num_rows < part.rows:
            rest = pa.concat_tables([rest, next(tables).replace_schema_metadata(None)])
        expected, rest = rest.slice(0, part.rows), rest.slice(part.rows)
        try:
            found = read_part(job.storage, part, manifest.schema)
        except (ValueError, JobError) as error:
            yield _defect(part.path, lasting(error))
            continue
        if not found.column("sample_id").equals(expected.column("sample_id")):
            yield _defect(part.path, "its rows are not those of the dataset")
            continue
        now = expected.column("pixel_sha256")
        same = pc.if_else(
            pc.is_null(now), pc.is_null(found.column("pixel_sha256")), pc.equal(now, found.column("pixel_sha256"))
        )
        changed = expected.filter(pc.invert(pc.fill_null(same, False)))  # noqa: FBT003 - a value
        if changed.num_rows:
            first = changed.column("sample_id")[0].as_py()
            yield _defect(
                part.path, f"{changed.num_rows:,} samples were made again after they were scored, first {first}"
            )


def _defect(path: str, detail: str) -> Defect:
    return Defect(kind="scores-wrong", path=path, detail=detail)
