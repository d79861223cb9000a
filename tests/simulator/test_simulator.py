"""The protocol holds in every schedule; a protocol with one mistake planted in it does not."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import pyarrow as pa
import pytest

import latentmill.jobs.runner
from latentmill.jobs.job import Job
from latentmill.jobs.ledger.ledger import Ledger, _path
from latentmill.jobs.ledger.picture_store import Origin, PictureStore, StoredImage, attempt_folder
from latentmill.jobs.ledger.records import CommitRecord, decode_record, encode_record
from latentmill.jobs.outputs import clean as clean_module
from latentmill.jobs.outputs import publish as publish_module
from latentmill.jobs.outputs.publish import load_publication
from tests.simulator.schedule import Outcome, first_violation, run_schedule

pytestmark = pytest.mark.slow

SCHEDULES = 300


@pytest.mark.slow
def test_the_invariants_hold_in_every_schedule() -> None:
    first = int(os.environ.get("LATENTMILL_TEST_SEED", random.randrange(2**32)))
    print(f"LATENTMILL_TEST_SEED={first}")
    outcomes = [run_schedule(seed) for seed in range(first, first + SCHEDULES)]
    for name in ("kills", "freezes", "faults", "lost", "cleaned", "conflicts", "repaired"):
        assert sum(getattr(outcome, name) for outcome in outcomes) > SCHEDULES // 50, f"too few {name} to mean anything"


def test_a_seed_replays_exactly_and_another_does_not() -> None:
    first: list[Outcome] = [run_schedule(seed) for seed in range(20)]
    assert [run_schedule(seed) for seed in range(20)] == first
    assert len({outcome.trace for outcome in first}) == 20


def assert_caught(invariants: str, *, within: int) -> None:
    """The planted mistake breaks one of the invariants within so many schedules, and the failing seed replays."""
    found = first_violation(range(within))
    assert found is not None, f"{within} schedules did not see the mistake"
    number, violation = found
    text = str(violation)
    assert any(f"Violation: {invariant}" in text for invariant in invariants.split()), text
    seed = int(text.removeprefix("seed ").partition(":")[0])
    again = first_violation(range(seed, seed + 1))
    assert again is not None
    assert str(again[1]) == text
    print(f"caught after {number} schedules: {text.splitlines()[0]}")


def test_committing_before_the_images_are_written_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    write, commit = PictureStore.write, Ledger.commit
    waiting: dict[str, Callable[[], object]] = {}

    def promise(
        self: PictureStore,
        chunk: int,
        attempt: str,
        images: Sequence[tuple[str, bytes]],
        repair: int = 0,
        origins: Mapping[str, Origin] = MappingProxyType({}),
    ) -> dict[str, StoredImage]:
        waiting[attempt] = lambda: write(self, chunk, attempt, images, repair, origins)
        folder = attempt_folder(chunk, attempt, repair)
        return {
            name: StoredImage(path=f"{folder}/{name}.png", size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in images
        }

    def commit_first(self: Ledger, chunk: int, attempt: str, data: bytes) -> str:
        outcome = commit(self, chunk, attempt, data)
        waiting.pop(attempt)()
        return outcome

    monkeypatch.setattr(PictureStore, "write", promise)
    monkeypatch.setattr(Ledger, "commit", commit_first)
    assert_caught("I2", within=10)


def test_cleaning_attempts_at_open_chunks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    losers = clean_module._Cleaning._losers

    def everything_if_open(self, found):
        chunk, attempts = found
        if self._job.ledger.read(chunk) is None:
            return [entry for entries in attempts.values() for entry in entries]
        return losers(self, found)

    monkeypatch.setattr(clean_module._Cleaning, "_losers", everything_if_open)
    assert_caught("I2 I6", within=400)


def test_overwriting_instead_of_creating_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self: Ledger, chunk: int, number: int, attempt: str, data: bytes) -> str:
        self.storage.write(_path(chunk, number), data)
        return "mine"

    monkeypatch.setattr(Ledger, "_create", overwrite)
    assert_caught("I5", within=50)


def test_trusting_a_refusal_without_reading_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def trust(self: Ledger, chunk: int, number: int, attempt: str, data: bytes) -> str:
        return "mine" if self.storage.create(_path(chunk, number), data) else "lost"

    monkeypatch.setattr(Ledger, "_create", trust)
    assert_caught("I1", within=100)


def test_publishing_from_a_listing_of_images_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_listed(job: Job, repairs: Mapping[int, int], *, present: bool) -> Callable[[int], CommitRecord]:
        def fetch(chunk: int) -> CommitRecord:
            record = job.ledger.effective(chunk, repairs.get(chunk, 0))
            assert record is not None
            listed = {
                path.rpartition("/")[2]: path for path, _ in job.storage.list("images") if f"{chunk:08d}-" in path
            }
            images = [listed.get(f"{name}.png") for name in record.table.column("sample_id").to_pylist()]
            place = record.table.schema.get_field_index("image")
            table = record.table.set_column(place, record.table.schema.field(place), [pa.array(images, pa.string())])
            return replace(record, table=table)

        return fetch

    monkeypatch.setattr(publish_module, "_fetch", fetch_listed)
    assert_caught("I1", within=200)


def test_appending_a_repair_whose_number_is_taken_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    commit_repair = Ledger.commit_repair

    def append(self: Ledger, chunk: int, number: int, attempt: str, data: bytes) -> str:
        record = decode_record(data)
        while commit_repair(self, chunk, number, attempt, data) == "lost":
            number += 1
            data = encode_record(
                record.table.to_pylist(),
                self.schema,
                chunk=chunk,
                attempt=attempt,
                plan_hash=record.plan_hash,
                execution_class=record.execution_class,
                versions={},
                repair=number,
            )
        return "mine"

    monkeypatch.setattr(Ledger, "commit_repair", append)
    assert_caught("I5", within=400)


def test_a_publication_that_stands_without_the_last_repairs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (publish_module, latentmill.jobs.runner):
        monkeypatch.setattr(module, "standing_publication", load_publication)
    assert_caught("I9", within=50)


def test_cleaning_repairs_by_their_commit_record_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_the_commit_record(self, found):
        chunk, attempts = found
        record = self._job.ledger.read(chunk)
        if record is None:
            return []
        return [entry for (_, attempt), entries in attempts.items() if attempt != record.attempt for entry in entries]

    monkeypatch.setattr(clean_module._Cleaning, "_losers", by_the_commit_record)
    assert_caught("I2 I6", within=100)
