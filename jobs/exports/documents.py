"""What an export says of itself: its plan, written once; a record of each shard; and last what is in it.

DEST/_export/plan.json            what is exported, how it is cut: created before anything else, never changed
DEST/_export/shards/000/00000.json   the files of one shard, with their digests: written after them
DEST/_export/export.json          the whole: written when every shard is there
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.exports.format import Shard, WrittenFile
from latentmill.jobs.exports.rows import Source
from latentmill.jobs.exports.spec import ExportSpec, make_export_spec
from latentmill.jobs.plans.planned import fingerprint
from latentmill.jobs.store.storage import Storage

PLAN_PATH = "_export/plan.json"
MANIFEST_PATH = "_export/export.json"

_MADE_WITH = ("latentmill", "pyarrow", "Pillow")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What is exported and how it is cut. Two exports with one plan write the same bytes, unless they are signed.

    `signing` says by whom, if they are (signing.py); where the certificate and its key lie is not told.
    """

    source: Mapping[str, Any]
    options: Mapping[str, Any]
    shards: Sequence[Shard]
    made_with: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in _MADE_WITH})
    signing: Mapping[str, Any] | None = None

    @cached_property
    def digest(self) -> str:
        """One digest of it all."""
        return fingerprint(self._document())

    def to_json(self) -> bytes:
        """The file's bytes."""
        return _encode({**self._document(), "digest": self.digest})

    def spec(self, dest: str, sign: str | None = None, key: str | None = None) -> ExportSpec:
        """The export that it was made for. One that is signed needs the places of the certificate and its key."""
        signed: dict[str, Any] = {}
        if self.signing is not None:
            told = self.signing["prompts"], self.signing["timestamp_url"]
            signed = {"sign": sign, "key": key, "sign_prompt": told[0], "timestamp_url": told[1]}
        return make_export_spec({**self.options, "out": dest, **signed})

    def _document(self) -> dict[str, Any]:
        shards = [[shard.split, shard.start, shard.stop, shard.rows] for shard in self.shards]
        parts = {"source": dict(self.source), "options": dict(self.options), "made_with": dict(self.made_with)}
        signed = {} if self.signing is None else {"signing": dict(self.signing)}
        return {"format": _FORMAT, **parts, "shards": shards, **signed}

    @classmethod
    def from_json(cls, data: bytes) -> ExportPlan:
        """Raises ValueError for anything but the file of a plan."""
        try:
            told = json.loads(data)
            if told["format"] != _FORMAT:
                raise ValueError(f"it is of format {told['format']}, this version reads {_FORMAT}")
            cuts = [tuple(cut) for cut in told["shards"]]
            made = cls(
                source=told["source"],
                options=told["options"],
                made_with=told["made_with"],
                signing=told.get("signing"),
                shards=number_shards(cuts, alone=told["options"].get("split") is None),
            )
            if made.digest != told["digest"]:
                raise ValueError("it was changed after it was written")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is not the plan of an export: {error}") from error
        return made


def number_shards(cuts: Sequence[tuple[str, int, int, int]], *, alone: bool) -> tuple[Shard, ...]:
    """Shards from their splits, first rows, ends and numbers of rows: each counted within its split.

    `alone`: no splits were asked for.
    """
    counts = Counter(split for split, *_ in cuts)
    begun: Counter[str] = Counter()
    shards = []
    for split, start, stop, rows in cuts:
        index, count = begun[split], counts[split]
        begun[split] += 1
        shards.append(Shard(split=split, index=index, count=count, start=start, stop=stop, rows=rows, alone=alone))
    return tuple(shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """The files of one shard as they were written."""

    plan: str
    shard: int
    files: tuple[WrittenFile, ...]

    def to_json(self) -> bytes:
        """The file's bytes."""
        return _encode(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> ShardRecord:
        """Raises ValueError for anything but the record of a shard."""
        try:
            told = json.loads(data)
            return cls(
                plan=told["plan"], shard=told["shard"], files=tuple(WrittenFile(**file) for file in told["files"])
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is not the record of a shard: {error}") from error


def record_path(shard: int) -> str:
    """Where the record of a shard lies."""
    return f"_export/shards/{shard // 1000:03d}/{shard:05d}.json"


def read_record(dest: Storage, plan: ExportPlan, shard: int) -> ShardRecord | None:
    """The record of a shard of that plan; None if there is none, or a damaged one."""
    try:
        record = ShardRecord.from_json(dest.read(record_path(shard)))
    except (FileNotFoundError, ValueError):
        return None
    return record if (record.plan, record.shard) == (plan.digest, shard) else None


def manifest(plan: ExportPlan, records: Sequence[ShardRecord], last: Sequence[WrittenFile]) -> bytes:
    """The bytes of what is written last."""
    rows: Counter[str] = Counter()
    for shard in plan.shards:
        rows[shard.split] += shard.rows
    files = [file for record in records for file in record.files] + list(last)
    told = {
        "format": _FORMAT,
        "plan": plan.digest,
        "rows": dict(rows),
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "digest": fingerprint([[file.path, file.sha256] for file in files]),
        "last_files": [asdict(file) for file in last],
    }
    return _encode(told)


def read_plan(dest: Storage) -> ExportPlan:
    """The plan of the export at a place. Raises UsageError if none has begun there, JobError if it is damaged."""
    try:
        return ExportPlan.from_json(dest.read(PLAN_PATH))
    except FileNotFoundError:
        raise UsageError(
            f"{dest.url} holds no export; make one by: latentmill export OUT --to hf --out {dest.url}"
        ) from None
    except ValueError as error:
        raise JobError(f"{PLAN_PATH} in {dest.url} cannot be read: {error}; use another --out") from error


def adopt(dest: Storage, plan: ExportPlan) -> bool:
    """Afterwards the place belongs to this plan; False if it did before.

    Raises UsageError if it holds anything but an export, OutputConflictError if it holds another one.
    """
    if not dest.exists(PLAN_PATH):
        found = next(iter(dest.list("")), None)
        if found is not None:
            raise UsageError(f"{dest.url} holds something else ({found[0]}); name an empty place with --out")
        if dest.create(PLAN_PATH, plan.to_json()):
            return True
    there = read_plan(dest)
    if there.digest != plan.digest:
        raise OutputConflictError(
            f"{dest.url} holds another export: {'; '.join(_differences(there, plan))}; name another --out, or give "
            f"the same options"
        )
    return False


def source_facts(source: Source) -> dict[str, Any]:
    """What tells one published dataset from another."""
    return {"plan_hash": source.job.plan.plan_hash, "rows": source.publication.rows, "digest": source.digest}


def _differences(there: ExportPlan, here: ExportPlan) -> list[str]:
    """In words, what differs between the plan that is there and the one that was asked for."""
    if there.source != here.source:
        if there.source.get("plan_hash") != here.source["plan_hash"]:
            return ["it was made from another dataset"]
        return ["the dataset was published again since, with other rows"]
    found = [
        f"{name} is {told.get(name)} there and {asked.get(name)} here"
        for told, asked in (
            (there.options, here.options),
            (there.made_with, here.made_with),
            ({"signing": there.signing}, {"signing": here.signing}),
        )
        for name in sorted({*told, *asked})
        if told.get(name) != asked.get(name)
    ]
    return found or ["its shards are cut otherwise"]


def _encode(document: Any) -> bytes:
    return (json.dumps(document, indent=None, sort_keys=True, separators=(",", ":")) + "\n").encode()
