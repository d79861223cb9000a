"""The published dataset is a function of the ledger: sorted, complete, the same for every publisher."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from latentmill.jobs.errors import JobError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.ledger import record_path
from latentmill.jobs.ledger.records import encode_record
from latentmill.jobs.outputs import merge
from latentmill.jobs.outputs import publish as publish_module
from latentmill.jobs.outputs.captions import CARD, CARD_PATH, captions_path
from latentmill.jobs.outputs.publish import MANIFEST_PATH, load_publication, publish, standing_publication
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, pictures, run
from tests.jobs.outputs.repairs import HealedEngine, repair

pytestmark = pytest.mark.slow

Manifest = Callable[..., Path]


@pytest.fixture
def make_job(tiny_model: Path, tmp_path: Path) -> Callable[..., Job]:
    """A finished job with many groups, whose samples are interleaved in the plan's order."""

    def make(rows: int = 40, **settings: Any) -> Job:
        chooser = random.Random(0)
        manifest = tmp_path / "rows.jsonl"
        with manifest.open("w") as file:
            for number in range(rows):
                row = {
                    "prompt": f"number {number}"
                    + (" nsfw" if number % 11 == 5 else " poison" if number % 13 == 7 else ""),
                    "width": chooser.choice([64, 128]),
                    "num_inference_steps": chooser.choice([2, 3, 4]),
                    "topic": f"topic {number % 3}",
                }
                file.write(json.dumps(row) + "\n")
        out = str(tmp_path / "out")
        run(job_spec(tiny_model, manifest, out, width=None, num_inference_steps=None, on_flagged="drop", **settings))
        return open_job(out)

    return make


def files_of(job: Job) -> dict[str, bytes]:
    paths = [path for path, _ in job.storage.list("dataset")]
    paths += [path for path in (MANIFEST_PATH, captions_path(0), CARD_PATH) if job.storage.exists(path)]
    return {path: job.storage.read(path) for path in paths}


def unpublish(job: Job) -> None:
    for path in files_of(job):
        job.storage.delete(path)


@pytest.mark.parametrize("rows_per_part", [1, 7, 40, 1000])
def test_parts_are_sorted_complete_and_described(
    rows_per_part: int, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job(sweep={"guidance_scale": [1.0, 4.0]}, chunk_size=3)
    assert len(job.plan.grid.groups) == 12
    unpublish(job)
    publication = publish(job, rows_per_part=rows_per_part)
    assert [part.rows for part in publication.parts[:-1]] == [rows_per_part] * (len(publication.parts) - 1)
    rows = [row for part in publication.parts for row in pq.read_table(tmp_path / "out" / part.path).to_pylist()]
    assert [int(row["sample_id"]) for row in rows] == list(range(80))
    planned = {
        sample.sample_id: sample for chunk in range(job.plan.n_chunks) for sample in job.plan.samples_of_chunk(chunk)
    }
    assert all(row["prompt"] == planned[row["sample_id"]].request.prompt for row in rows)
    assert all(row["topic"] == planned[row["sample_id"]].extra["topic"] for row in rows)
    assert publication.rows == 80
    assert publication.counts == {
        status: sum(row["status"] == status for row in rows) for status in ("ok", "flagged", "failed")
    }
    assert publication.counts["flagged"] == 8
    assert publication.images == publication.counts["ok"]
    assert publication.image_bytes == sum(row["bytes"] or 0 for row in rows)
    assert {name for name, _ in publication.schema} >= {"sample_id", "topic", "sha256"}


def test_a_chunk_is_read_once_also_where_groups_share_it(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(sweep={"guidance_scale": [1.0, 4.0]}, chunk_size=16)
    before = files_of(job)
    assert max(map(job.plan.groups_in, range(job.plan.n_chunks))) > 1
    unpublish(job)
    reads: list[int] = []
    read = type(job.ledger).read
    monkeypatch.setattr(type(job.ledger), "read", lambda self, chunk: (reads.append(chunk), read(self, chunk))[1])
    publish(job, rows_per_part=5)
    assert sorted(reads) == list(range(job.plan.n_chunks))
    unpublish(job)
    publish(job)
    assert files_of(job) == before


def test_publishing_again_writes_nothing(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    before = files_of(job)

    def refuse(*_: object) -> None:
        pytest.fail("something was written")

    monkeypatch.setattr(job.storage._backend, "write", refuse)
    publish(job)
    assert files_of(job) == before


def test_two_publishers_at_once_write_the_same_dataset(make_job: Callable[..., Job]) -> None:
    job = make_job()
    before = files_of(job)
    unpublish(job)
    with ThreadPoolExecutor(4) as pool:
        publications = list(pool.map(lambda _: publish(job), range(4)))
    assert files_of(job) == before
    assert all(publication == publications[0] for publication in publications)


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "part cut short", "part missing"])
def test_a_damaged_publication_is_made_again(damage: str, make_job: Callable[..., Job]) -> None:
    job = make_job()
    before = files_of(job)
    part = next(path for path in before if path.startswith("dataset/"))
    match damage:
        case "no manifest":
            job.storage.delete(MANIFEST_PATH)
        case "broken manifest":
            job.storage.write(MANIFEST_PATH, before[MANIFEST_PATH][:50])
        case "part cut short":
            job.storage.write(part, before[part][:-1])
        case "part missing":
            job.storage.delete(part)
    publish(job)
    assert files_of(job) == before


def test_a_missing_picture_or_record_stops_publication(make_job: Callable[..., Job]) -> None:
    job = make_job()
    unpublish(job)
    picture = next(path for path, _ in pictures(job.storage))
    data = job.storage.read(picture)
    job.storage.write(picture, data[:-1])
    with pytest.raises(JobError, match=f"1 committed pictures are missing or cut short.*{picture}"):
        publish(job)
    job.storage.write(picture, data)
    record = job.storage.read(record_path(1))
    job.storage.write(record_path(1), record[:100] + bytes([record[100] ^ 1]) + record[101:])
    with pytest.raises(JobError, match="is damaged"):
        publish(job)
    job.storage.delete(record_path(1))
    with pytest.raises(JobError, match="chunk 1 is not committed"):
        publish(job)
    assert files_of(job) == {CARD_PATH: CARD}
    job.storage.write(record_path(1), record)
    assert publish(job).rows == 40


def test_a_ledger_that_holds_a_sample_twice_is_not_published(make_job: Callable[..., Job]) -> None:
    job = make_job()
    unpublish(job)
    record = job.ledger.read(0)
    assert record is not None
    rows = record.table.to_pylist()
    data = encode_record(
        [rows[0], *rows[:-1]],
        job.ledger.schema,
        chunk=0,
        attempt=record.attempt,
        plan_hash=record.plan_hash,
        execution_class=record.execution_class,
        versions={},
    )
    job.storage.write(record_path(0), data)
    with pytest.raises(JobError, match="not in the ledger exactly once"):
        publish(job)
    assert MANIFEST_PATH not in files_of(job)


def test_memory_does_not_grow_with_the_number_of_chunks(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(rows=60, chunk_size=1)
    unpublish(job)
    live, peak = 0, 0
    read = type(job.ledger).read

    def counted(self: object, chunk: int) -> object:
        nonlocal live, peak
        live += 1
        peak = max(peak, live)
        return read(self, chunk)

    taken = merge._Stream._next

    def next_counted(self: object) -> object:
        nonlocal live
        table = taken(self)
        live -= table is not None
        return table

    monkeypatch.setattr(merge, "_READ_AHEAD", 8)
    monkeypatch.setattr(type(job.ledger), "read", counted)
    monkeypatch.setattr(merge._Stream, "_next", next_counted)
    publish(job, rows_per_part=5)
    assert peak <= 8 + len(job.plan.grid.groups)


def failing_chunks(job: Job) -> list[int]:
    return list(job.ledger.failed_chunks())


def test_a_repair_is_published_again_and_says_so(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(chunk_size=4)
    before, first = files_of(job), publish(job)
    old = pq.read_table(tmp_path / "out" / first.parts[0].path).to_pylist()
    assert (first.repairs, first.counts["failed"]) == (0, 3)
    for number, chunk in enumerate(failing_chunks(job), start=1):
        assert repair(str(tmp_path / "out"), chunk).outcome == "committed"
        assert standing_publication(job) is None
        publication = publish(job)
        assert standing_publication(job) == publication == load_publication(job)
        assert (publication.repairs, publication.rows) == (number, 40)
    assert publication.counts == {"ok": first.counts["ok"] + 3, "flagged": first.counts["flagged"], "failed": 0}
    assert publication.images == first.images + 3
    (part,) = publication.parts
    rows = {row["sample_id"]: row for row in pq.read_table(tmp_path / "out" / part.path).to_pylist()}
    for row in old:
        new = rows[row["sample_id"]]
        assert new == row if row["status"] != "failed" else (new["status"], "-r1-" in new["image"]) == ("ok", True)
    assert publication.image_bytes == sum(row["bytes"] or 0 for row in rows.values())
    parts = {first.parts[0].path}
    changed = {path for path, _ in before.items() - files_of(job).items()}
    assert changed <= {MANIFEST_PATH, captions_path(0), *parts}
    assert {path for path in files_of(job) if path.startswith("dataset/part")} == {part.path}


def test_a_repairs_execution_class_is_listed(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(chunk_size=4)

    def elsewhere(plan: Plan, device: str) -> HealedEngine:
        return HealedEngine(batch_size=plan.batch_size, execution_class="elsewhere")

    repair(str(tmp_path / "out"), failing_chunks(job)[0], elsewhere)
    assert publish(job).execution_classes == ("elsewhere", "fake")


def test_a_repairs_missing_picture_stops_publication(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(chunk_size=4)
    repair(str(tmp_path / "out"), failing_chunks(job)[0])
    picture = next(path for path, _ in pictures(job.storage) if "-r1-" in path)
    data = job.storage.read(picture)
    job.storage.delete(picture)
    with pytest.raises(JobError, match=f"1 committed pictures are missing or cut short.*{picture}"):
        publish(job)
    job.storage.write(picture, data)
    assert publish(job).repairs == 1


def test_a_repair_that_comes_while_parts_are_written_is_published_too(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publisher that was overtaken never puts less in the place of more."""
    job = make_job(chunk_size=4)
    first, second, *_ = failing_chunks(job)
    repair(str(tmp_path / "out"), first)
    write, manifests = type(job.storage).write, []

    def write_and_repair(self: Storage, path: str, data: bytes) -> None:
        if path.startswith("dataset/part-") and not manifests and job.ledger.listing().n_repairs == 1:
            repair(str(tmp_path / "out"), second)
        if path == MANIFEST_PATH:
            manifests.append(json.loads(data)["repairs"])
        write(self, path, data)

    monkeypatch.setattr(type(job.storage), "write", write_and_repair)
    assert publish(job).repairs == 2
    assert manifests == [2]


def test_a_sleepers_older_manifest_is_replaced_at_once(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen right before its last write, until somebody else has repaired and published."""
    job = make_job(chunk_size=4)
    chunk = failing_chunks(job)[0]
    unpublish(job)
    write, manifests = type(job.storage).write, []

    def sleep_and_write(self: Storage, path: str, data: bytes) -> None:
        if path == MANIFEST_PATH:
            manifests.append(json.loads(data)["repairs"])
            if len(manifests) == 1:
                repair(str(tmp_path / "out"), chunk)
                publish(job)
        write(self, path, data)

    monkeypatch.setattr(type(job.storage), "write", sleep_and_write)
    assert publish(job).repairs == 1
    assert manifests == [0, 1, 1]
    publication = load_publication(job)
    assert publication is not None
    assert publication.repairs == 1


def test_a_publication_that_never_stands_is_given_up(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    unpublish(job)
    monkeypatch.setattr(publish_module, "standing_publication", lambda _: None)
    with pytest.raises(JobError, match="changed by somebody else each time"):
        publish(job)


def test_a_manifest_from_before_there_were_repairs_stands(make_job: Callable[..., Job]) -> None:
    job = make_job()
    document = json.loads(job.storage.read(MANIFEST_PATH))
    del document["repairs"]
    job.storage.write(MANIFEST_PATH, json.dumps(document).encode())
    publication = standing_publication(job)
    assert publication is not None
    assert publication.repairs == 0


def test_a_deep_status_counts_effective_rows(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job, out = make_job(chunk_size=4), str(tmp_path / "out")
    assert (status(out).state, status(out).counts) == ("published", {"ok": 33, "flagged": 4, "failed": 3})
    repair(out, failing_chunks(job)[0])
    report = status(out, deep=True)
    assert (report.state, report.repairs, report.counts) == ("complete", 1, {"ok": 34, "flagged": 4, "failed": 2})
    assert status(out).counts is None


def test_captions_name_the_pictures_that_count_and_no_other(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(sweep={"guidance_scale": [1.0, 4.0]}, chunk_size=3)
    unpublish(job)
    publication = publish(job)
    job.storage.write("images/00000/00000000-0123456789abcdef/00000000.png", b"of an attempt that lost")
    (named,) = publication.captions
    captions = pq.read_table(tmp_path / "out" / named.path).to_pylist()
    rows = [row for part in publication.parts for row in pq.read_table(tmp_path / "out" / part.path).to_pylist()]
    assert [f"images/00000/{caption.pop('file_name')}" for caption in captions] == [
        row["image"] for row in rows if row["image"] is not None
    ]
    names = {"sample_id", "row_id", "prompt", "negative_prompt", "seed", "status"}
    assert captions == [{name: row[name] for name in captions[0]} for row in rows if row["image"] is not None]
    assert captions[0].keys() == names


def test_a_card_of_somebody_elses_stays(make_job: Callable[..., Job]) -> None:
    job = make_job()
    unpublish(job)
    job.storage.write(CARD_PATH, b"# My birds")
    publish(job)
    assert job.storage.read(CARD_PATH) == b"# My birds"


def test_captions_of_a_publisher_that_slept_are_replaced(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have one place each: put over those of a publication with more repairs, they must not stay."""
    job = make_job(chunk_size=4)
    chunk = failing_chunks(job)[0]
    unpublish(job)
    write, slept = type(job.storage).write, []

    def sleep_and_write(self: Storage, path: str, data: bytes) -> None:
        if path == captions_path(0) and not slept:
            slept.append(path)
            repair(str(tmp_path / "out"), chunk)
            publish(job)
        write(self, path, data)

    monkeypatch.setattr(type(job.storage), "write", sleep_and_write)
    assert publish(job).repairs == 1
    assert verify(str(tmp_path / "out")).defects == ()
