"""The commit record: one sealed Parquet object that says everything about one finished chunk.

A record is a Parquet file whose footer carries the SHA-256 of the whole file, taken with the seal itself blanked out.
So one GET is enough to know that not a single byte has changed since the worker wrote it.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.jobs.code import version_of
from latentmill.jobs.errors import JobError
from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.plans.columns import STATUSES
from latentmill.jobs.spec import MAX_CHUNK
from latentmill.jobs.store.parquet import OversizeError, read_parquet

MAX_BYTES = 1 << 30
"""The largest record, packed or unpacked."""

_ROW_BYTES = 2 << 20
"""The most that a row unpacks to: a mebibyte of carried columns, and the project's own."""

_SEAL_KEY = b"latentmill.seal"
_SEAL_PREFIX = b"sha256="
_BLANK = b"0" * 64


class DamagedRecordError(JobError):
    """A commit record that is not, byte for byte, what a worker wrote."""


class WrongRepairError(DamagedRecordError):
    """A repair record that would change more than failed rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """One commit record as read back: its rows and who wrote them.

    `repair` is this object's own number, 0 for a commit record and 1, 2, ... for the repair records beside it.
    `repaired_by` are the attempts whose repairs the rows already include, in order: empty for what was merely read.
    """

    chunk: int
    attempt: str
    plan_hash: str
    execution_class: str
    table: pa.Table
    metadata: Mapping[str, str]
    repair: int = 0
    repaired_by: tuple[str, ...] = ()

    @property
    def repairs(self) -> int:
        """How many repair records the rows include; the next repair of the chunk has the number after that."""
        return len(self.repaired_by)

    @property
    def attempts(self) -> tuple[str, ...]:
        """Whose pictures the rows refer to, by number of the repair: the commit's own attempt comes first."""
        return (self.attempt, *self.repaired_by)

    def counts(self) -> dict[str, int]:
        """Number of rows by status."""
        return count_statuses(self.table)

    def failed(self) -> tuple[int, ...]:
        """Places within the chunk of the rows that failed."""
        failed = pc.equal(self.table.column("status"), "failed").to_numpy()
        return tuple(np.flatnonzero(failed).tolist())

    def with_repair(self, repair: CommitRecord) -> CommitRecord:
        """These rows with the repair's in the place of those that failed.

        Raises WrongRepairError if the repair is not the next one, is empty, or has any row but those that
        failed before and no longer do.
        """
        if repair.repair != self.repairs + 1 or repair.chunk != self.chunk:
            raise WrongRepairError(
                f"it says repair {repair.repair} of chunk {repair.chunk}, "
                f"not repair {self.repairs + 1} of chunk {self.chunk}"
            )
        samples, repaired = self.table.column("sample_id").to_pylist(), repair.table.column("sample_id").to_pylist()
        places = {samples[place]: place for place in self.failed()}
        order = np.arange(len(samples))
        for number, sample in enumerate(repaired):
            if sample not in places:
                raise WrongRepairError(f"sample {sample} did not fail before it, or is there twice")
            order[places.pop(sample)] = len(samples) + number
        if not repaired or repair.failed():
            raise WrongRepairError("it repairs nothing: it has no rows, or rows that failed again")
        table = pa.concat_tables([self.table, repair.table]).take(pa.array(order)).combine_chunks()
        return replace(self, table=table, repaired_by=(*self.repaired_by, repair.attempt))


_FILLED = ("row_id", "prompt", "negative_prompt", "seed", "width", "height", "num_inference_steps", "sampler", "status")
_FINITE = ("guidance_scale", "eta", "strength")
_SAMPLE_ID = r"^[0-9]{1,18}$"


def strange_value(table: pa.Table) -> str | None:
    """The first thing in rows that no job writes, of what all that read them rely on; None if there is none.

    Anybody can write rows, and seal them. Other columns may hold anything of their type, or null.
    """
    here = set(table.column_names)
    if "sample_id" in here:
        ids = table.column("sample_id")
        numbers = pc.match_substring_regex(ids, _SAMPLE_ID).fill_null(fill_value=False)
        if not pc.all(numbers, min_count=0).as_py():
            return f"sample_id {shorten(ids.filter(pc.invert(numbers))[0].as_py())}"
    null = next((name for name in _FILLED if name in here and table.column(name).null_count), None)
    if null is not None:
        return f"{null} null"
    return next(
        (f"{name} that is no number" for name in _FINITE if name in here and not _is_finite(table.column(name))), None
    )


def _is_finite(column: pa.ChunkedArray) -> bool:
    return not pa.types.is_floating(column.type) or pc.all(pc.is_finite(column)).as_py() is not False


def count_statuses(table: pa.Table) -> dict[str, int]:
    """Number of rows by status; the three statuses are always present."""
    counts = dict.fromkeys(STATUSES, 0)
    for entry in table.column("status").value_counts().to_pylist():
        counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts


def encode_record(
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    *,
    chunk: int,
    attempt: str,
    plan_hash: str,
    execution_class: str,
    versions: Mapping[str, str],
    details: Mapping[str, str] | None = None,
    repair: int = 0,
) -> bytes:
    """The rows as a sealed Parquet file; `details` (timings, actor, what the plan says of the model) go to the file's
    metadata, never to its rows.

    `repair` is the number of a repair record, which holds only the repaired rows; 0 makes a commit record.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    if table.nbytes > MAX_BYTES:
        raise JobError(
            f"chunk {chunk} has {table.nbytes:,} bytes of rows, the limit is {MAX_BYTES:,}; use a smaller --chunk-size"
        )
    metadata = {
        "plan_hash": plan_hash,
        "attempt": attempt,
        "chunk": str(chunk),
        "execution_class": execution_class,
        **({"repair": str(repair)} if repair else {}),
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{f"version.{name}": version for name, version in versions.items()},
        **(details or {}),
    }
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({f"latentmill.{key}": value for key, value in metadata.items()})
        writer.add_key_value_metadata({_SEAL_KEY.decode(): (_SEAL_PREFIX + _BLANK).decode()})
    return _seal(buffer.getvalue())


def decode_record(data: bytes, *, max_rows: int = MAX_CHUNK) -> CommitRecord:
    """The record, once its seal has been checked; `DamagedRecordError` says what is wrong otherwise.

    Anybody can seal a file, so it is not unpacked if it has more rows or bytes than a record may have.
    """
    _check_seal(data)
    try:
        table = read_parquet(data, max_rows=max_rows, max_bytes=min(max_rows * _ROW_BYTES, MAX_BYTES))
    except (pa.ArrowException, OSError, OversizeError) as error:
        raise DamagedRecordError(f"not readable as Parquet: {error}") from error
    metadata = {
        key.decode().removeprefix("latentmill."): value.decode()
        for key, value in (table.schema.metadata or {}).items()
        if key.startswith(b"latentmill.") and key != _SEAL_KEY
    }
    try:
        return CommitRecord(
            chunk=int(metadata["chunk"]),
            attempt=metadata["attempt"],
            plan_hash=metadata["plan_hash"],
            execution_class=metadata["execution_class"],
            table=table.replace_schema_metadata(None),
            metadata=metadata,
            repair=int(metadata.get("repair", "0")),
        )
    except (KeyError, ValueError) as error:
        raise DamagedRecordError(f"its file metadata are incomplete: {error}") from error


def tool_versions() -> dict[str, str]:
    """Versions that a reader of the dataset may need to make it again."""
    names = ("latentmill", "torch", "transformers", "pyarrow", "numpy", "Pillow")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def _seal_position(data: bytes) -> int:
    """Where the 64 hexadecimal digits of the seal stand; -1 if there is none."""
    key = data.rfind(_SEAL_KEY)
    start = data.find(_SEAL_PREFIX, key) if key >= 0 else -1
    return start + len(_SEAL_PREFIX) if start >= 0 else -1


def _seal(data: bytes) -> bytes:
    position = _seal_position(data)
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:position] + digest + data[position + len(digest) :]


def _check_seal(data: bytes) -> None:
    position = _seal_position(data)
    if position < 0:
        raise DamagedRecordError("it has no seal")
    end = position + len(_BLANK)
    blanked = data[:position] + _BLANK + data[end:]
    if hashlib.sha256(blanked).hexdigest().encode() != data[position:end]:
        raise DamagedRecordError("its bytes do not match its seal (changed or cut short after it was written)")
