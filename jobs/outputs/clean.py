"""Removes proven garbage from an output, and nothing that may still become part of a dataset.

An attempt is garbage when its chunk is committed by another attempt; an attempt at a repair, when the repair record of
that number is another attempt's. Records never change, so garbage stays garbage: cleaning may race with any driver, and
be killed anywhere.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.ledger import PER_FOLDER
from latentmill.jobs.ledger.picture_store import attempt_folder
from latentmill.jobs.ledger.records import DamagedRecordError
from latentmill.jobs.outputs.publish import PART_NAME, standing_publication
from latentmill.jobs.store.storage import Storage

GRACE_SECONDS = 86_400.0
"""The age at which temporary files and unnamed parts are removed: their writers have ended by then."""

_Entry = tuple[str, int]
_THREADS = 8
_Attempts = dict[tuple[int, str], list[_Entry]]
"""The objects of each attempt, by number of the repair (0 for the chunk itself) and attempt."""
_ATTEMPT = re.compile(r"images/\d{5,}/(\d{8,})-(?:r([1-9]\d*)-)?([0-9a-f]{16})/[^/]+", re.ASCII)
_TEMPORARY = re.compile(r"(?:_job|images|ledger|dataset|report|scores)/(?:.+/)?\.[^/]+\.[0-9a-f]{12}\.tmp")
_PROBE = re.compile(r"_job/\.probe-[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanReport:
    """What was removed, or would be (`dry_run`). Objects and bytes are those of all four kinds together."""

    out: str
    dry_run: bool
    attempts: int
    images: int
    parts: int
    temporary_files: int
    probes: int
    objects: int
    bytes: int
    open_attempts: int
    """Attempts at chunks or repairs that are not committed yet: kept, they may still win."""
    unreadable_chunks: tuple[int, ...]
    """Chunks whose records are damaged: none of their objects was touched; `verify` says what is wrong."""

    @property
    def exit_code(self) -> int:
        """0 unless a commit record could not be read."""
        return 1 if self.unreadable_chunks else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": self.exit_code}


def clean(out_url: str, *, dry_run: bool = False, grace_seconds: float = GRACE_SECONDS) -> CleanReport:
    """Afterwards attempts that lost their chunk, old temporary files, probes and unnamed dataset parts are gone.

    Everything a commit record or the dataset's manifest refers to, and every attempt at an open chunk, is untouched.
    Raises UsageError if the output has no plan, OutputConflictError if a record belongs to another plan.
    """
    cleaning = _Cleaning(open_job(out_url), dry_run=dry_run)
    cleaning.attempts()
    cleaning.strays(grace_seconds)
    return cleaning.report()


class _Cleaning:
    def __init__(self, job: Job, *, dry_run: bool) -> None:
        self._job = job
        self._dry_run = dry_run
        self._counts: Counter[str] = Counter()
        self._unreadable: set[int] = set()

    def report(self) -> CleanReport:
        return CleanReport(
            out=self._job.storage.url,
            dry_run=self._dry_run,
            attempts=self._counts["attempts"],
            images=self._counts["images"],
            parts=self._counts["parts"],
            temporary_files=self._counts["temporary_files"],
            probes=self._counts["probes"],
            objects=sum(self._counts[kind] for kind in ("images", "parts", "temporary_files", "probes")),
            bytes=self._counts["bytes"],
            open_attempts=self._counts["open_attempts"],
            unreadable_chunks=tuple(sorted(self._unreadable)),
        )

    def attempts(self) -> None:
        """Every attempt that lost, one folder of a thousand chunks at a time."""
        for folder in range((self._job.plan.n_chunks + PER_FOLDER - 1) // PER_FOLDER):
            found: dict[int, _Attempts] = {}
            for path, size in self._job.storage.list(f"images/{folder:05d}"):
                place = _ATTEMPT.fullmatch(path)
                if place is None:
                    continue
                chunk, repair, attempt = int(place[1]), int(place[2] or 0), place[3]
                if path.startswith(f"{attempt_folder(chunk, attempt, repair)}/"):
                    found.setdefault(chunk, {}).setdefault((repair, attempt), []).append((path, size))
            with ThreadPoolExecutor(_THREADS) as pool:
                losers = [entry for entries in pool.map(self._losers, found.items()) for entry in entries]
            self._delete("images", losers)

    def strays(self, grace_seconds: float) -> None:
        """Temporary files, probes, and parts that the standing manifest does not name, once they are old enough."""
        storage = self._job.storage
        suspects: dict[str, list[_Entry]] = {"parts": [], "temporary_files": [], "probes": []}
        parts = [entry for entry in storage.list("dataset") if PART_NAME.fullmatch(entry[0])]
        publication = standing_publication(self._job)
        if publication is not None:
            named = {part.path for part in publication.parts}
            suspects["parts"] = [entry for entry in parts if entry[0] not in named]
        for folder in ("_job", "images", "ledger", "dataset", "report", "scores"):
            for path, size in storage.list_hidden(folder):
                if _TEMPORARY.fullmatch(path):
                    suspects["temporary_files"].append((path, size))
                elif _PROBE.fullmatch(path):
                    suspects["probes"].append((path, size))
        if any(suspects.values()):
            latest = _now(storage, dry_run=self._dry_run) - grace_seconds
            for kind, entries in suspects.items():
                self._delete(kind, [entry for entry in entries if _is_older(storage, entry[0], latest)])

    def _losers(self, found: tuple[int, _Attempts]) -> list[_Entry]:
        """The objects of the attempts at a chunk that its records rule out."""
        chunk, attempts = found
        try:
            # repairs are looked up only if some attempt at one exists
            needed = None if any(repair for repair, _ in attempts) else 0
            record = self._job.ledger.effective(chunk, needed)
        except DamagedRecordError:
            self._unreadable.add(chunk)
            return []
        if record is None:
            self._counts["open_attempts"] += len(attempts)
            return []
        referenced = set(record.table.column("image").to_pylist())
        losers = []
        for (repair, attempt), entries in attempts.items():
            if repair > record.repairs:
                self._counts["open_attempts"] += 1
            # no record refers to another attempt's pictures; if one does, they are not garbage
            elif attempt != record.attempts[repair] and referenced.isdisjoint(path for path, _ in entries):
                self._counts["attempts"] += 1
                losers.extend(entries)
        return losers

    def _delete(self, kind: str, entries: Sequence[_Entry]) -> None:
        if not self._dry_run:
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(self._job.storage.delete, [path for path, _ in entries]):
                    pass
        self._counts[kind] += len(entries)
        self._counts["bytes"] += sum(size for _, size in entries)


def _now(storage: Storage, *, dry_run: bool) -> float:
    """The store's time, which may be a day off the local one; a dry run writes nothing and uses the local one."""
    if dry_run:
        return time.time()
    path = f"_job/.probe-{secrets.token_hex(8)}"
    storage.write(path, b"clock")
    try:
        now = storage.modified(path)
    except FileNotFoundError:
        return 0.0  # this process slept for a day and another one removed the probe: treat nothing as old
    storage.delete(path)
    return now


def _is_older(storage: Storage, path: str, latest: float) -> bool:
    try:
        return storage.modified(path) <= latest
    except FileNotFoundError:
        return False  # its owner or another process has just removed it
