"""Commit records -> one sorted dataset: `dataset/part-*.parquet`, captions, and last its manifest `_job/dataset.json`.

`dataset/` holds nothing but parts, so that any reader of Parquet takes the folder as it is.
Commit records and repairs never change, so publishing is a pure function of the ledger as it was listed: two
publishers at once, or one after a crash, write the same bytes under the same names. A publication says how many repairs
it includes; once the ledger has more, it no longer stands and the next publisher replaces it. The manifest names the
parts that count: those of the publication before lie beside them until `clean` removes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.ledger import PER_FOLDER, LedgerListing
from latentmill.jobs.ledger.records import CommitRecord, count_statuses, strange_value
from latentmill.jobs.outputs.captions import CAPTIONS_NAME, CARD, CARD_PATH, CaptionShelf, Fetch, encode_captions
from latentmill.jobs.outputs.merge import merged_tables
from latentmill.jobs.plans.columns import STATUSES
from latentmill.jobs.plans.planned import PLAN_PATH, Plan
from latentmill.jobs.spec import MAX_CHUNK
from latentmill.jobs.store.parquet import OversizeError, read_parquet
from latentmill.jobs.store.storage import Storage

MANIFEST_PATH = "_job/dataset.json"
OLD_MANIFEST_PATH = "dataset/manifest.json"
"""Where outputs of format 2 have it."""
PART_NAME = re.compile(r"dataset/part-\d{5,}-([0-9a-f]{16})\.parquet", re.ASCII)
"""The names of parts; in the middle the first digits of their SHA-256. A manifest with any other name is forged."""
ROWS_PER_PART = 50_000
MAX_PART_BYTES = 2 << 30
"""The largest part, packed or unpacked."""
MAX_MANIFEST_BYTES = 64 << 20
_MOST_ROWS = {PART_NAME: ROWS_PER_PART, CAPTIONS_NAME: PER_FOLDER * MAX_CHUNK}
_ROUNDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One published Parquet file."""

    path: str
    rows: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ValueError for what no publisher writes: readers and cleaners go by these names."""
        most = next((rows for name, rows in _MOST_ROWS.items() if name.fullmatch(str(self.path))), 0)
        if not most or not isinstance(self.sha256, str):
            raise ValueError("it names a part that is none")
        if not (_is_count(self.rows, 1, most) and _is_count(self.bytes, 1, MAX_PART_BYTES)):
            raise ValueError("it has a part of an impossible size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """What the manifest of a dataset says."""

    plan_hash: str
    rows: int
    counts: dict[str, int]
    images: int
    image_bytes: int
    rejected_rows: int
    repairs: int
    """Repair records that the rows include."""
    execution_classes: tuple[str, ...]
    schema: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    captions: tuple[Part, ...] = ()
    """What lies beside the pictures for loaders of pictures; outputs of format 2 have none."""

    def to_json(self) -> bytes:
        """The manifest file's bytes: the same publication always gives the same ones."""
        fields = {name: value for name, value in asdict(self).items() if name != "captions" or value}
        return (json.dumps({"format": 1, **fields}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Publication:
        """Raises ValueError for anything but a manifest file."""
        try:
            fields = json.loads(data)
            if fields.pop("format") != 1:
                raise ValueError("it is of a newer format")
            fields.setdefault("repairs", 0)  # written before there were any
            fields["parts"] = tuple(Part(**part) for part in fields["parts"])
            fields["captions"] = tuple(Part(**part) for part in fields.get("captions", ()))
            fields["schema"] = tuple((name, kind) for name, kind in fields["schema"])
            fields["execution_classes"] = tuple(fields["execution_classes"])
            made = cls(**fields)
            names = ((PART_NAME, made.parts), (CAPTIONS_NAME, made.captions))
            if not all(name.fullmatch(part.path) for name, parts in names for part in parts):
                raise ValueError("it names a part that is none")
            counts = [made.rows, made.images, made.image_bytes, made.repairs, made.rejected_rows]
            counts += [made.counts[status] for status in STATUSES]
            if not all(_is_count(count) for count in counts):
                raise ValueError("one of its totals is no whole number")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is not a dataset manifest: {error}") from error
        return made


def _is_count(value: Any, least: int = 0, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def manifest_path(plan: Plan) -> str:
    """Where an output of this plan has its dataset's manifest."""
    return MANIFEST_PATH if plan.format_version > 2 else OLD_MANIFEST_PATH


def find_manifest(storage: Storage) -> str:
    """The same for an output whose plan is not read: the place that is taken."""
    return next((path for path in (MANIFEST_PATH, OLD_MANIFEST_PATH) if storage.exists(path)), MANIFEST_PATH)


def load_publication(job: Job) -> Publication | None:
    """The published manifest; None if the dataset is not published or its manifest is damaged."""
    try:
        publication = Publication.from_json(job.storage.read(manifest_path(job.plan), MAX_MANIFEST_BYTES))
    except (FileNotFoundError, ValueError):
        return None
    return publication if publication.plan_hash == job.plan.plan_hash else None


def known_rows(job: Job, table: pa.Table) -> pa.Table:
    """The rows of a published part. Raises JobError if they are none that a job writes."""
    strange = strange_value(table)
    if strange is not None:
        url = job.storage.url
        raise JobError(
            f"{url}/dataset has a row that no job writes ({strange}); `latentmill verify {url}` says what is wrong "
            f"with it"
        )
    return table


def read_columns(job: Job, part: Part, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part. Raises FileNotFoundError if it is gone, JobError if it is not as it was published."""
    try:
        data = job.storage.read(part.path, part.bytes)
        return known_rows(job, read_parquet(data, columns, max_rows=part.rows, max_bytes=MAX_PART_BYTES))
    except (pa.ArrowException, KeyError, OversizeError) as error:
        raise JobError(
            f"{part.path} in {job.storage.url} is damaged: {error}; heal it by: latentmill repair {job.storage.url}"
        ) from error


def standing_publication(job: Job) -> Publication | None:
    """The publication if it stands, all its parts present, with every repair that there is now; None otherwise."""
    publication = load_publication(job)
    if publication is None or publication.repairs < job.ledger.listing().n_repairs:
        return None
    sizes = dict(job.storage.list("dataset"))
    whole = all(sizes.get(part.path) == part.bytes for part in publication.parts)
    return publication if whole else None


def publish(
    job: Job,
    *,
    rows_per_part: int = ROWS_PER_PART,
    again: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> Publication:
    """Afterwards the dataset is published: every row once, sorted by sample_id, every referenced object present.

    Call it when every chunk is committed. A publication that stands is left alone; the parts of one that it replaces
    are removed, so that a reader of `dataset/part-*.parquet` meets no sample twice. `again` writes all of it once more,
    even over one that stands, whose pictures were seen when it was published. Raises JobError if the plan, a record or
    a referenced picture is missing.
    """
    if not job.storage.exists(PLAN_PATH):
        raise JobError(
            f"{PLAN_PATH} has vanished from {job.storage.url} while the job ran; "
            f"run the same command again: it plans anew"
        )
    replaced = written = None
    present = True
    if again:
        replaced = load_publication(job)
        present = replaced is None
        rows_per_part = replaced.parts[0].rows if replaced is not None and replaced.parts else rows_per_part
    for _ in range(_ROUNDS):
        standing = None if again and written is None else standing_publication(job)
        # captions have one place each: if ours overwrote those of a publication with more repairs, publish again
        if standing is not None and written in {None, standing.captions}:
            if replaced is not None and (replaced.repairs < standing.repairs or again):
                _remove_parts(job, replaced, standing)
            return standing
        replaced = load_publication(job) or replaced
        listing = job.ledger.listing()
        fetch = _fetch(job, listing.repairs, present=present)
        publication = _write_parts(job, listing, fetch, rows_per_part, on_rows)
        written = publication.captions
        # a repair may have come meanwhile, and its driver may have published: that must not be replaced by less
        if job.ledger.listing().n_repairs == listing.n_repairs:
            job.storage.write(manifest_path(job.plan), publication.to_json())
            # The next round looks again: a publisher that slept between the two lines above has put an older manifest
            # back. If it is killed before it looks, the older one does not stand, and `verify` and the next run say so.
    raise JobError(
        f"{job.storage.url}/dataset was published {_ROUNDS} times and changed by somebody else each time; "
        f"wait for the other drivers, then run the same command again"
    )


def _remove_parts(job: Job, replaced: Publication, standing: Publication) -> None:
    """Remove what only the replaced publication names. A publisher that still writes it is behind, and will see so."""
    for part in {part.path for part in replaced.parts} - {part.path for part in standing.parts}:
        job.storage.delete(part)


def _write_parts(
    job: Job, listing: LedgerListing, fetch: Fetch, rows_per_part: int, on_rows: Callable[[int], None] | None
) -> Publication:
    """Afterwards the parts of this listing's publication are there, and nothing names them yet."""
    tally = _Tally()
    parts, captions, metadata = [], list[Part](), job.plan.file_metadata
    if manifest_path(job.plan) == MANIFEST_PATH:
        if not job.storage.exists(CARD_PATH):
            job.storage.create(CARD_PATH, CARD)  # a card that a user wrote stays
        fetch = CaptionShelf(
            job.plan.n_chunks,
            lambda path, table: captions.append(_write(job, path, table.num_rows, encode_captions(table, metadata))),
        ).watching(fetch)
    for number, table in enumerate(merged_tables(job, fetch, rows_per_part)):
        data = encode_part(table, metadata)
        path = f"dataset/part-{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        parts.append(_write(job, path, table.num_rows, data))
        tally.add(table)
        if on_rows is not None:
            on_rows(tally.rows)
    return Publication(
        plan_hash=job.plan.plan_hash,
        rows=tally.rows,
        counts=tally.counts,
        images=tally.images,
        image_bytes=tally.image_bytes,
        rejected_rows=job.plan.n_rejected,
        repairs=listing.n_repairs,
        execution_classes=tuple(sorted(tally.execution_classes)),
        schema=tuple((field.name, str(field.type)) for field in job.ledger.schema),
        parts=tuple(parts),
        captions=tuple(sorted(captions, key=lambda part: part.path)),
    )


class _Tally:
    """Totals over the published rows."""

    def __init__(self) -> None:
        self.rows = self.images = self.image_bytes = 0
        self.counts = dict.fromkeys(STATUSES, 0)
        self.execution_classes: set[str] = set()

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        for status, count in count_statuses(table).items():
            self.counts[status] += count
        self.images += table.num_rows - table.column("image").null_count
        self.image_bytes += pc.sum(table.column("bytes")).as_py() or 0
        self.execution_classes.update(table.column("execution_class").drop_null().unique().to_pylist())


def encode_part(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a published part, with what the whole file says of itself."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(dict(metadata) or None), buffer, compression="zstd")
    return buffer.getvalue()


def _write(job: Job, path: str, rows: int, data: bytes) -> Part:
    job.storage.write(path, data)
    return Part(path=path, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _fetch(job: Job, repairs: Mapping[int, int], *, present: bool) -> Fetch:
    """Reads a chunk with its repairs, and with `present` makes sure that all its pictures are there with their size."""

    def fetch(chunk: int) -> CommitRecord:
        record = job.ledger.effective(chunk, repairs.get(chunk, 0))
        if record is None:
            raise JobError(f"chunk {chunk} is not committed; run the same command again")
        rows: list[dict[str, Any]] = record.table.select(["image", "bytes"]).to_pylist()
        wanted = {row["image"]: row["bytes"] for row in rows if row["image"] is not None} if present else {}
        found: dict[str, int] = {}
        for repair, attempt in enumerate(record.attempts if wanted else ()):
            found |= job.pictures.sizes(chunk, attempt, repair)
        missing = sorted(path for path, size in wanted.items() if found.get(path) != size)
        if missing:
            raise JobError(
                f"{len(missing)} committed pictures are missing or cut short in {job.storage.url}, first {missing[0]}; "
                f"latentmill repair heals what can be made again"
            )
        return record

    return fetch
