"""`latentmill export`: a published dataset in another tool's form, shard by shard, resumed where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.jobs.errors import JobError
from latentmill.jobs.exports.documents import (
    MANIFEST_PATH,
    ExportPlan,
    ShardRecord,
    adopt,
    manifest,
    number_shards,
    read_record,
    source_facts,
)
from latentmill.jobs.exports.format import Written, WrittenFile
from latentmill.jobs.exports.rows import open_source
from latentmill.jobs.exports.shards import Export, cut, write_file
from latentmill.jobs.exports.signing import open_signing
from latentmill.jobs.exports.spec import ExportSpec
from latentmill.jobs.exports.table import EXPORTS, runner
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import refuse_inside

_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProgress:
    """How far it is: rows whose shards are there."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What lies at `dest` now. `written` shards are this run's; the others were there, whole."""

    dest: str
    to: str
    rows: dict[str, int]
    """By split."""
    shards: int
    written: int
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def export(
    out_url: str, spec: ExportSpec, *, on_progress: Callable[[ExportProgress], None] = lambda _: None
) -> ExportSummary:
    """Afterwards the export at `spec.out` is whole: every shard, what is told of all of them, and last its manifest.

    Shards that are there as they were recorded are left alone. Raises UsageError if the output has no plan or the place
    holds something else, OutputConflictError if it holds another export, JobError if the dataset is not published, no
    row is chosen, or a picture is not as its row says.
    """
    work = _planned(out_url, spec, on_progress)
    found = {} if adopt(work.dest, work.plan) else _whole_shards(work)
    shards, records = work.plan.shards, dict(found)
    total, done = sum(shard.rows for shard in shards), sum(shards[number].rows for number in found)
    missing = [number for number in range(len(shards)) if number not in found]
    on_progress(ExportProgress(phase="exporting", done=done, total=total))
    for record in runner(spec.executor)(work, missing) if missing else ():
        records[record.shard] = record
        done += shards[record.shard].rows
        on_progress(ExportProgress(phase="exporting", done=done, total=total))
    told = json.loads(_finish(work, [records[number] for number in range(len(shards))]))
    return ExportSummary(
        dest=work.dest.url,
        to=spec.to,
        rows={split: told["rows"][split] for split in spec.splits if split in told["rows"]},
        shards=len(shards),
        written=len(missing),
        files=told["files"],
        bytes=told["bytes"],
    )


def _planned(out_url: str, spec: ExportSpec, on_progress: Callable[[ExportProgress], None]) -> Export:
    """What is to be exported, and how it is cut; nothing is written yet."""
    refuse_inside(spec.out, out_url)
    source = open_source(out_url)
    on_progress(ExportProgress(phase="choosing rows", done=0, total=source.publication.rows))
    cuts = cut(source, spec)
    if not cuts:
        wanted = f"the status {spec.status}" + (f" and {spec.filter}" if spec.filter else "")
        raise JobError(
            f"no row of {source.job.storage.url} is chosen: of {source.publication.rows:,} rows, none has a picture, "
            f"{wanted}; widen --status or --filter"
        )
    shards = number_shards(cuts, alone=spec.split is None)
    signing = open_signing(spec, source.job.plan.model.digest)
    facts = None if signing is None else signing.facts
    plan = ExportPlan(source=source_facts(source), options=spec.planned(), shards=shards, signing=facts)
    return Export(source=source, dest=Storage.open(spec.out), spec=spec, plan=plan)


def _whole_shards(work: Export) -> dict[int, ShardRecord]:
    """The shards that lie there with the sizes of their records; with `verify`, with their digests too."""
    sizes = dict(work.dest.list(""))

    def look(number: int) -> ShardRecord | None:
        record = read_record(work.dest, work.plan, number)
        whole = record is not None and all(_is_whole(work, sizes, file) for file in record.files)
        return record if whole else None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(look, range(len(work.plan.shards)))
        return {record.shard: record for record in found if record is not None}


def _is_whole(work: Export, sizes: Mapping[str, int], file: WrittenFile) -> bool:
    if sizes.get(file.path) != file.bytes:
        return False
    return not work.spec.verify or hashlib.sha256(work.dest.read(file.path)).hexdigest() == file.sha256


def _finish(work: Export, records: list[ShardRecord]) -> bytes:
    """Afterwards the last files and the manifest are there, which is returned. What is there already is not touched."""
    written = Written(
        plan=work.source.job.plan,
        publication=work.source.publication,
        options=work.plan.options,
        signing=work.plan.signing,
        schema=work.schema,
        shards=[(shard, record.files) for shard, record in zip(work.plan.shards, records, strict=True)],
        read=work.dest.read,
    )
    last = [_placed(work.dest, path, data) for path, data in EXPORTS[work.spec.to].format.last_files(written)]
    told = manifest(work.plan, records, last)
    _placed(work.dest, MANIFEST_PATH, told)
    return told


def _placed(dest: Storage, path: str, data: bytes) -> WrittenFile:
    try:
        there = dest.read(path) == data
    except FileNotFoundError:
        there = False
    if not there:
        return write_file(dest, (path, data))
    return WrittenFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
