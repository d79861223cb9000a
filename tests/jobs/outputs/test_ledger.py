"""The commit protocol, one chunk at a time: one record wins, and everyone learns which."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from latentmill.jobs.errors import OutputConflictError
from latentmill.jobs.ledger.ledger import Ledger, chunk_of_path, record_path, repair_of_path, repair_path
from latentmill.jobs.ledger.records import (
    DamagedRecordError,
    WrongRepairError,
    decode_record,
    encode_record,
)
from latentmill.jobs.plans.columns import own_fields
from latentmill.jobs.store import storage as storage_module
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage

SCHEMA = pa.schema([*own_fields(), pa.field("topic", pa.string())])
PLAN = "a" * 64
ROW: dict[str, Any] = {"row_id": "0", "negative_prompt": "", "seed": 1, "width": 64, "height": 64}
ROW |= {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "ddim", "eta": 0.0}
"""What every row of a job has; all else may be null."""


def record(attempt: str, *, chunk: int = 7, plan_hash: str = PLAN, samples: int = 3) -> bytes:
    rows = [{**ROW, "sample_id": f"{number:05d}", "status": "ok", "prompt": "0" * 64} for number in range(samples)]
    return encode_record(
        rows, SCHEMA, chunk=chunk, attempt=attempt, plan_hash=plan_hash, execution_class="cpu", versions={"python": "3"}
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(storage=Storage.open(str(tmp_path / "out")), plan_hash=PLAN, n_chunks=2001, schema=SCHEMA)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_sleep", lambda _: None)


def test_first_commit_stands_and_the_second_learns_it(ledger: Ledger) -> None:
    assert ledger.read(7) is None
    first = record("first")
    assert ledger.commit(7, "first", first) == "mine"
    assert ledger.commit(7, "second", record("second")) == "lost"
    assert ledger.commit(7, "first", first) == "mine"
    stands = ledger.read(7)
    assert stands is not None
    assert stands.attempt == "first"
    assert stands.counts() == {"ok": 3, "flagged": 0, "failed": 0}
    assert ledger.storage.read(record_path(7)) == first


@pytest.mark.parametrize("answers_lost", [1, storage_module.TRIES])
def test_a_lost_answer_is_still_a_commit(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, answers_lost: int) -> None:
    create, lost = ledger.storage._backend.create, [0]

    def create_and_drop_the_answer(path: str, data: bytes) -> bool:
        made = create(path, data)
        lost[0] += 1
        if lost[0] <= answers_lost:
            raise ConnectionResetError("the answer was lost")
        return made

    monkeypatch.setattr(ledger.storage._backend, "create", create_and_drop_the_answer)
    assert ledger.commit(7, "first", record("first")) == "mine"
    lost[0] = 0
    assert ledger.commit(7, "second", record("second")) == "lost"


def test_an_unknown_outcome_is_not_a_commit(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> bytes:
        raise TimeoutError("timed out")

    monkeypatch.setattr(ledger.storage._backend, "create", unreachable)
    with pytest.raises(StorageError, match="cannot create"):
        ledger.commit(7, "first", record("first"))
    monkeypatch.setattr(ledger.storage._backend, "read", unreachable)
    with pytest.raises(StorageError, match="cannot create"):
        ledger.commit(7, "first", record("first"))


def test_another_plans_record_is_fatal(ledger: Ledger) -> None:
    ledger.storage.create(record_path(7), record("theirs", plan_hash="b" * 64))
    with pytest.raises(OutputConflictError, match="belongs to plan bbbb"):
        ledger.commit(7, "mine", record("mine"))
    with pytest.raises(OutputConflictError):
        ledger.read(7)


def test_every_flipped_byte_of_a_record_is_found() -> None:
    data = record("first")
    assert decode_record(data).table.column("prompt")[0].as_py() == "0" * 64
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << random.Random(position).randrange(8)
        with pytest.raises(DamagedRecordError):
            decode_record(bytes(changed))
    for length in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(DamagedRecordError):
            decode_record(data[:length])


def test_a_record_in_the_wrong_place_is_damage(ledger: Ledger) -> None:
    ledger.storage.create(record_path(8), record("first", chunk=7))
    with pytest.raises(DamagedRecordError, match="says chunk 7"):
        ledger.read(8)


def test_committed_chunks_come_from_names_alone(ledger: Ledger) -> None:
    chosen = {0, 7, 999, 1000, 1999, 2000}
    for chunk in chosen:
        ledger.storage.create(record_path(chunk), b"not read")
    for stray in ("ledger/00000/notes.txt", "ledger/00000/00000003.r1.parquet", "ledger/00000/.00000004.parquet.1.tmp"):
        ledger.storage.write(stray, b"x")
    ledger.storage.write("ledger/00001/00000005.parquet", b"in the wrong folder")
    ledger.storage.write("ledger/00002/00002001.parquet", b"beyond the plan")
    assert set(ledger.committed().nonzero()[0].tolist()) == chosen


def test_paths_and_chunks_are_each_others_inverse() -> None:
    for chunk in (0, 999, 1000, 12_345_678, 99_999_999, 123_456_789):
        assert chunk_of_path(record_path(chunk)) == chunk


@pytest.mark.parametrize("place", ["local", "memory", "s3"])
def test_racing_attempts_agree_on_one_winner(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}.get(place) or request.getfixturevalue("s3")
    ledger = Ledger(storage=Storage.open(url), plan_hash=PLAN, n_chunks=10, schema=SCHEMA)
    attempts, chunks = (2, 2) if place == "s3" else (6, 5)  # SeaweedFS takes seconds over every loser
    for chunk in range(chunks):
        barrier = threading.Barrier(attempts)

        def commit(number: int, chunk: int = chunk, barrier: threading.Barrier = barrier) -> str:
            data = record(f"attempt{number}", chunk=chunk)
            barrier.wait()
            return ledger.commit(chunk, f"attempt{number}", data)

        with ThreadPoolExecutor(attempts) as pool:
            outcomes = list(pool.map(commit, range(attempts)))
        assert sorted(outcomes) == ["lost"] * (attempts - 1) + ["mine"]
        stands = ledger.read(chunk)
        assert stands is not None
        assert stands.attempt == f"attempt{outcomes.index('mine')}"


def test_listing_many_chunks_needs_little_memory() -> None:
    class Listing(Storage):
        """Lists as a full store would, without all the files."""

        def list(self, prefix: str) -> Iterator[tuple[str, int]]:
            folder = int(prefix.rpartition("/")[2])
            yield from [(record_path(chunk), 8000) for chunk in range(folder * 1000, folder * 1000 + 1000, 2)]

    ledger = Ledger(storage=Listing("memory://many"), plan_hash=PLAN, n_chunks=200_000, schema=SCHEMA)
    tracemalloc.start()
    try:
        committed = ledger.committed()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert committed.sum() == 100_000
    assert committed[::2].all()
    assert peak < 10_000_000


def rows_of(**statuses: str) -> list[dict[str, Any]]:
    return [
        {**ROW, "sample_id": name.removeprefix("s"), "status": status, "prompt": status, "error": None}
        for name, status in statuses.items()
    ]


def sealed(rows: list[dict[str, Any]], attempt: str, repair: int = 0, **changes: object) -> bytes:
    how = {"chunk": 7, "plan_hash": PLAN, "execution_class": "cpu", "versions": {}} | changes
    return encode_record(rows, SCHEMA, attempt=attempt, repair=repair, **how)  # type: ignore[arg-type]


@pytest.fixture
def damaged_chunk(ledger: Ledger) -> Ledger:
    """Chunk 7 with rows 1 and 3 failed."""
    ledger.commit(7, "base", sealed(rows_of(s0="ok", s1="failed", s2="flagged", s3="failed"), "base"))
    return ledger


def statuses(ledger: Ledger, repairs: int | None = None) -> list[str]:
    record = ledger.effective(7, repairs)
    assert record is not None
    assert record.table.column("sample_id").to_pylist() == ["0", "1", "2", "3"]
    return list(record.table.column("status").to_pylist())


def test_repairs_supersede_failed_rows_one_after_the_other(damaged_chunk: Ledger) -> None:
    ledger = damaged_chunk
    assert ledger.failed_samples(7) == (1, 3)
    assert ledger.commit_repair(7, 1, "first", sealed(rows_of(s3="flagged"), "first", 1)) == "mine"
    assert statuses(ledger) == ["ok", "failed", "flagged", "flagged"]
    assert ledger.commit_repair(7, 1, "late", sealed(rows_of(s1="ok"), "late", 1)) == "lost"
    assert statuses(ledger) == ["ok", "failed", "flagged", "flagged"]
    assert list(ledger.failed_chunks()) == [7]
    assert ledger.commit_repair(7, 2, "second", sealed(rows_of(s1="ok"), "second", 2)) == "mine"
    assert statuses(ledger) == ["ok", "ok", "flagged", "flagged"]
    assert [statuses(ledger, number).count("failed") for number in range(3)] == [2, 1, 0]
    record = ledger.effective(7)
    assert record is not None
    assert (record.attempt, record.repairs, record.attempts) == ("base", 2, ("base", "first", "second"))
    assert (ledger.failed_samples(7), list(ledger.failed_chunks())) == ((), [])
    listing = ledger.listing()
    assert (dict(listing.repairs), listing.n_repairs, int(listing.committed.sum())) == ({7: 2}, 2, 1)
    commit = ledger.read(7)
    assert commit is not None
    assert commit.counts() == {"ok": 1, "flagged": 1, "failed": 2}


@pytest.mark.parametrize("answers_lost", [1, storage_module.TRIES])
def test_a_repairs_lost_answer_is_still_a_commit(
    damaged_chunk: Ledger, monkeypatch: pytest.MonkeyPatch, answers_lost: int
) -> None:
    create, lost = damaged_chunk.storage._backend.create, [0]

    def create_and_drop_the_answer(path: str, data: bytes) -> bool:
        made = create(path, data)
        lost[0] += 1
        if lost[0] <= answers_lost:
            raise ConnectionResetError("the answer was lost")
        return made

    monkeypatch.setattr(damaged_chunk.storage._backend, "create", create_and_drop_the_answer)
    assert damaged_chunk.commit_repair(7, 1, "first", sealed(rows_of(s1="ok"), "first", 1)) == "mine"
    lost[0] = 0
    assert damaged_chunk.commit_repair(7, 1, "second", sealed(rows_of(s1="ok"), "second", 1)) == "lost"


@pytest.mark.parametrize(
    "rows",
    [
        {"s0": "ok"},
        {"s2": "ok"},
        {"s1": "ok", "s2": "ok"},
        {"s4": "ok"},
        {"s1": "failed"},
        {"s1": "ok", "s3": "failed"},
        {},
    ],
)
def test_a_repair_that_would_change_more_than_failed_rows_is_wrong(damaged_chunk: Ledger, rows: dict[str, str]) -> None:
    damaged_chunk.storage.create(repair_path(7, 1), sealed(rows_of(**rows), "wrong", 1))
    with pytest.raises(WrongRepairError, match=r"00000007\.r1\.parquet"):
        damaged_chunk.effective(7)


def test_a_row_is_repaired_once(damaged_chunk: Ledger) -> None:
    damaged_chunk.commit_repair(7, 1, "first", sealed([*rows_of(s1="ok"), *rows_of(s1="ok")], "first", 1))
    with pytest.raises(WrongRepairError, match="sample 1 did not fail before it, or is there twice"):
        damaged_chunk.effective(7)


@pytest.mark.parametrize(("chunk", "number"), [(7, 2), (7, 0), (8, 1)])
def test_a_record_takes_no_repair_but_its_next(damaged_chunk: Ledger, chunk: int, number: int) -> None:
    record = damaged_chunk.read(7)
    assert record is not None
    repair = decode_record(sealed(rows_of(s1="ok"), "a", number, chunk=chunk))
    with pytest.raises(WrongRepairError, match="not repair 1 of chunk 7"):
        record.with_repair(repair)


def test_a_repair_of_another_plan_chunk_or_number_never_counts(damaged_chunk: Ledger) -> None:
    ledger, rows = damaged_chunk, rows_of(s1="ok")
    ledger.storage.write(repair_path(7, 1), sealed(rows, "a", 1, plan_hash="b" * 64))
    with pytest.raises(OutputConflictError, match="belongs to plan bbbb"):
        ledger.effective(7)
    for data in (sealed(rows, "a", 1, chunk=8), sealed(rows, "a", 2), sealed(rows, "a", 0), record("a")):
        ledger.storage.write(repair_path(7, 1), data)
        with pytest.raises(DamagedRecordError, match="is not this chunk's"):
            ledger.effective(7)
    ledger.storage.write(repair_path(7, 1), sealed(rows, "a", 1)[:-1])
    with pytest.raises(DamagedRecordError, match=r"repair record .* is damaged"):
        ledger.effective(7)
    ledger.storage.write(record_path(7), sealed(rows, "a", 1))
    with pytest.raises(DamagedRecordError, match="says chunk 7, repair 1"):
        ledger.read(7)


def test_a_repair_that_was_listed_and_is_gone_is_damage(damaged_chunk: Ledger) -> None:
    damaged_chunk.commit_repair(7, 2, "second", sealed(rows_of(s1="ok"), "second", 2))
    with pytest.raises(DamagedRecordError, match=r"r1\.parquet in .* is missing"):
        damaged_chunk.effective(7, damaged_chunk.repairs()[7])


def test_requests_for_repairs_are_spared_where_a_listing_knows(
    damaged_chunk: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = damaged_chunk.storage._backend.read
    monkeypatch.setattr(
        damaged_chunk.storage._backend, "read", lambda path, limit: reads.append(path) or read(path, limit)
    )
    damaged_chunk.effective(7, 0)
    assert reads == [record_path(7)]
    reads.clear()
    damaged_chunk.effective(7)
    assert reads == [record_path(7), repair_path(7, 1)]


def test_repair_paths_are_told_from_commit_records() -> None:
    for chunk, number in [(0, 1), (999, 12), (12_345_678, 2), (123_456_789, 3)]:
        assert repair_of_path(repair_path(chunk, number)) == (chunk, number)
        assert chunk_of_path(repair_path(chunk, number)) is None
        assert repair_of_path(record_path(chunk)) is None
    for stray in ("00000007.r0", "00000007.r01", "00000007.r", "7.r1", "00000007.r1.r2", "00000007.r²"):
        assert repair_of_path(f"ledger/00000/{stray}.parquet") is None
    assert repair_of_path("ledger/00001/00000007.r1.parquet") is None
