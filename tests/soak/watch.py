"""Looks at an output all the time, past the faults: what was once committed must stay, and what it refers to."""

from __future__ import annotations

import hashlib
import random
import threading
from typing import Any

from latentmill.jobs.ledger.records import decode_record
from latentmill.jobs.store.storage import Storage

_SECONDS = 1.0
_READ_AGAIN = 5


class Watch(threading.Thread):
    """Collects violations of I2, I5, I6 and I7 until `finish`. The storage is asked directly, without the proxy."""

    def __init__(self, out: str) -> None:
        super().__init__(daemon=True)
        self.violations: list[str] = []
        self.looks = 0
        self._storage = Storage.open(out)
        self._records: dict[str, str] = {}
        self._images: dict[str, tuple[str, int]] = {}
        self._plan: str | None = None
        self._over = threading.Event()
        self._random = random.Random(0)

    @property
    def records(self) -> int:
        """How many commit records it has seen."""
        return len(self._records)

    def run(self) -> None:
        while not self._over.wait(_SECONDS):
            try:
                self.look(self._random.sample(sorted(self._records), min(_READ_AGAIN, len(self._records))))
            except Exception as error:  # noqa: BLE001 - whatever blinds the watch is a finding, and ends the soak
                self._report(f"the watch broke: {type(error).__name__}: {error}")
                return

    def finish(self) -> None:
        """A last look, at every record."""
        self._over.set()
        self.join(60)
        self.look(sorted(self._records))

    def look(self, again: list[str]) -> None:
        """Read what is new and, again, the records named; then see that all that is referred to lies there."""
        self._check_plan()
        listed = {path for path, _ in self._storage.list("ledger")}
        for path in self._records.keys() - listed:
            self._report(f"I5: the commit record {path} is gone")
        for path in sorted(listed - self._records.keys()):
            self._read_new(path)
        for path in again:
            if _digest(self._storage.read(path)) != self._records[path]:
                self._report(f"I5: the commit record {path} has changed")
        stored = dict(self._storage.list("images"))
        for image, (record, size) in self._images.items():
            if stored.get(image) != size:
                self._report(f"I6: {image}, which {record} refers to, has {stored.get(image)} of its {size} bytes")
        self.looks += 1

    def _read_new(self, path: str) -> None:
        data = self._storage.read(path)
        self._records[path] = _digest(data)
        rows: list[dict[str, Any]] = decode_record(data).table.to_pylist()
        for row in rows:
            if row["image"] is not None:
                self._images[row["image"]] = (path, row["bytes"])
                if _digest(self._storage.read(row["image"])) != row["sha256"]:
                    self._report(f"I2: {row['image']} does not have the digest that {path} gives")

    def _check_plan(self) -> None:
        try:
            plan = _digest(self._storage.read("_job/plan.json"))
        except FileNotFoundError:
            if self._plan is not None:
                self._report("I7: the plan is gone")
            return
        if self._plan not in {None, plan}:
            self._report("I7: the plan has changed")
        self._plan = plan

    def _report(self, violation: str) -> None:
        if violation not in self.violations:
            self.violations.append(violation)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
