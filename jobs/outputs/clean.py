"""Sweep what no reader will ever want: proven garbage, and nothing that might still become a dataset.

An attempt is garbage when its chunk's commit record stands and is another attempt's; an attempt at a repair, when the
repair record of that number does. Records never change, so what is garbage once is garbage for ever: the sweep may race
with any driver, and be killed anywhere.
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
"""How old temporary files and unnamed parts must be: whoever wrote them is gone by then."""

_Entry = tuple[str, int]
_THREADS = 8
_Attempts = dict[tuple[int, str], list[_Entry]]
"""What lies there, by number of the repair (0 for the chunk itself) and attempt."""
_ATTEMPT = re.compile(r"images/\d{5,}/(\d{8,})-(?:r([1-9]\d*)-)?([0-9a-f]{16})/[^/]+", re.ASCII)
_TEMPORARY = re.compile(r"(?:_job|images|ledger|dataset|report)/(?:.+/)?\.[^/]+\.[0-9a-f]{12}\.tmp")
_PROBE = re.compile(r"_job/\.probe-[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanReport:
    """What was swept, or would be (`dry_run`). Objects and bytes are those of all four kinds together."""

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
    """Chunks whose records are damaged: nothing of theirs was touched; `verify` says what is wrong."""

    @property
    def exit_code(self) -> int:
        """0 unless a commit record could not be read."""
        return 1 if self.unreadable_chunks else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": self.exit_code}


def clean(out_url: str, *, dry_run: bool = False, grace_seconds: float = GRACE_SECONDS) -> CleanReport:
    """Afterwards no attempt is left that lost its chunk, nor old temporary files, probes and unnamed dataset parts.

    Everything a commit record or the dataset's manifest refers to, and every attempt at an open chunk, is untouched.
    Raises UsageError if the output has no plan, OutputConflictError if a record belongs to another plan.
    """
    open_job.cache_clear()
    sweep = _Sweep(open_job(out_url), dry_run=dry_run)
    sweep.attempts()
    sweep.strays(grace_seconds)
    return sweep.report()


class _Sweep:
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
        for folder in ("_job", "images", "ledger", "dataset", "report"):
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
        """What lies in the folders of those attempts at a chunk that its records rule out."""
        chunk, attempts = found
        try:
            # no repair is looked for where nothing was written for one
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
            # no record refers to another attempt's pictures; should one ever, they are not garbage
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
    """The time by the store's clock, which may be a day off ours; a dry run writes nothing and takes ours."""
    if dry_run:
        return time.time()
    path = f"_job/.probe-{secrets.token_hex(8)}"
    storage.write(path, b"clock")
    try:
        now = storage.modified(path)
    except FileNotFoundError:
        return 0.0  # asleep for longer than the grace, so that another sweep took the probe: nothing is old this time
    storage.delete(path)
    return now


def _is_older(storage: Storage, path: str, latest: float) -> bool:
    try:
        return storage.modified(path) <= latest
    except FileNotFoundError:
        return False  # its owner, or another sweep, has just removed it
