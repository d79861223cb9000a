"""One shard: its rows and pictures are read, checked and written whole, and then recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.exports.documents import ExportPlan, ShardRecord, read_plan, record_path, source_facts
from latentmill.jobs.exports.format import Picture, Shard, WrittenFile
from latentmill.jobs.exports.rows import Selection, Source, open_source, renamed
from latentmill.jobs.exports.signing import Signing, open_signing
from latentmill.jobs.exports.spec import ExportSpec
from latentmill.jobs.exports.table import EXPORTS, IMAGE_FORMATS
from latentmill.jobs.store.storage import Storage

_THREADS = 8
_PICTURE_COLUMN = "image"
_NEEDED = ["sample_id", _PICTURE_COLUMN, "bytes", "sha256", "width", "height", "prompt", "negative_prompt"]
_EXPORTED = ("exported_bytes", "exported_sha256")


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export that is under way: where from, where to, and how."""

    source: Source
    dest: Storage
    spec: ExportSpec
    plan: ExportPlan

    @cached_property
    def selection(self) -> Selection:
        """Which rows are exported."""
        return Selection(self.spec, self.source.schema)

    @cached_property
    def signing(self) -> Signing | None:
        """Who signs the pictures, if anybody. Raises UsageError if it is not who began the export."""
        found = open_signing(self.spec, self.source.job.plan.model.digest)
        if (None if found is None else found.facts) != self.plan.signing:
            raise UsageError(
                f"the certificate at {self.spec.sign} on this machine is not the one that the export at "
                f"{self.dest.url} was begun with; put that one there"
            )
        return found

    @cached_property
    def names(self) -> list[str]:
        """The exported columns' names: one that the export needs itself is the manifest's own, and gets a prefix."""
        kept = [name for name in self.source.schema.names if name != _PICTURE_COLUMN]
        return renamed(kept, {*_EXPORTED, *EXPORTS[self.spec.to].format.taken})

    @cached_property
    def schema(self) -> pa.Schema:
        """The exported columns."""
        types = [field.type for field in self.source.schema if field.name != _PICTURE_COLUMN]
        own = [pa.field(_EXPORTED[0], pa.uint32()), pa.field(_EXPORTED[1], pa.string())]
        return pa.schema([*(pa.field(name, type_) for name, type_ in zip(self.names, types, strict=True)), *own])


def open_export(out_url: str, dest_url: str, sign: str | None = None, key: str | None = None) -> Export:
    """The export that has begun at a place, for a process that did not begin it.

    Where its pictures are signed, certificate and key are files of this machine. Raises JobError if the dataset is
    another one by now.
    """
    dest, source = Storage.open(dest_url), open_source(out_url)
    plan = read_plan(dest)
    if plan.source != source_facts(source):
        raise JobError(f"{source.job.storage.url} was published again since this export began; use another --out")
    return Export(source=source, dest=dest, spec=plan.spec(dest_url, sign, key), plan=plan)


def cut(source: Source, spec: ExportSpec) -> list[tuple[str, int, int, int]]:
    """Where each shard begins and ends, split by split, and its rows. It follows from the rows and the spec alone."""
    selection = Selection(spec, source.schema)
    most_rows, most_bytes = spec.shard_limits
    cuts: dict[str, list[list[int]]] = {split: [] for split in spec.splits}
    weights = dict.fromkeys(spec.splits, 0)
    for first, table in source.tables():
        chosen = np.flatnonzero(selection.mask(table))
        splits = selection.splits(table)[chosen].tolist()
        sizes = table.column("bytes").fill_null(0).to_numpy()[chosen].tolist()
        for row, split, size in zip((chosen + first).tolist(), splits, sizes, strict=True):
            shards = cuts[split]
            if not shards or shards[-1][2] == most_rows or weights[split] + size > most_bytes:
                shards.append([row, row, 0])
                weights[split] = 0
            shards[-1][1] = row + 1
            shards[-1][2] += 1
            weights[split] += int(size)
    return [(split, start, stop, rows) for split, shards in cuts.items() for start, stop, rows in shards]


def write_shard(export: Export, number: int) -> ShardRecord:
    """Afterwards the files of that shard lie there, whole, and its record beside them.

    Raises JobError for a picture that is not as its row says, before anything of the shard is written.
    """
    shard = export.plan.shards[number]
    rows = _rows(export, shard)
    with ThreadPoolExecutor(_THREADS) as pool:
        of_models = ["model_sha256"] if len(export.source.job.plan.models) > 1 else []
        picture_rows = rows.select([*_NEEDED, *of_models]).to_pylist()
        pictures = list(pool.map(partial(_picture, export), picture_rows))
        exported = _exported(export, rows, pictures)
        files = EXPORTS[export.spec.to].format.files(shard, exported, pictures)
        written = tuple(_each_written(pool, export.dest, files))
    record = ShardRecord(plan=export.plan.digest, shard=number, files=written)
    export.dest.write(record_path(number), record.to_json())
    return record


def write_file(dest: Storage, file: tuple[str, bytes]) -> WrittenFile:
    """Afterwards the file lies there."""
    path, data = file
    dest.write(path, data)
    return WrittenFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _each_written(pool: ThreadPoolExecutor, dest: Storage, files: Any) -> Iterator[WrittenFile]:
    return pool.map(partial(write_file, dest), files)


def _rows(export: Export, shard: Shard) -> pa.Table:
    tables = [export.selection.rows(table, shard.split) for _, table in export.source.tables(shard.start, shard.stop)]
    rows = pa.concat_tables([export.source.schema.empty_table(), *tables]).combine_chunks()
    if rows.num_rows != shard.rows:
        raise JobError(
            f"{export.source.job.storage.url} has {rows.num_rows} rows for shard {shard.name}, its plan says "
            f"{shard.rows}; use another --out"
        )
    return rows


def _picture(export: Export, row: dict[str, Any]) -> Picture:
    entry = IMAGE_FORMATS[export.spec.image_format]
    data = export.source.picture(row)
    try:
        encoded = entry.encode(data, (row["width"], row["height"]), export.spec.image_quality)
    except ValueError as error:
        url = export.source.job.storage.url
        raise JobError(f"{row['image']} in {url} has the sha256 of its row, but is no picture: {error}") from error
    if export.signing is not None:
        encoded = export.signing.sign(encoded, export.spec.image_format, row)
    return Picture(key=row["sample_id"], suffix=entry.suffix, data=encoded)


def _exported(export: Export, rows: pa.Table, pictures: Sequence[Picture]) -> pa.Table:
    """The rows as they are exported."""
    kept = rows.drop_columns([_PICTURE_COLUMN]).rename_columns(export.names)
    sizes = pa.array([len(picture.data) for picture in pictures], pa.uint32())
    digests = pa.array([hashlib.sha256(picture.data).hexdigest() for picture in pictures], pa.string())
    return kept.append_column(_EXPORTED[0], sizes).append_column(_EXPORTED[1], digests)
