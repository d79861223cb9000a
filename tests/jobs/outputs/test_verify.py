"""`verify` finds whatever changed after it was written, and cries at nothing else."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.ledger import record_path, repair_path
from latentmill.jobs.ledger.pictures import encode_png
from latentmill.jobs.ledger.records import encode_record
from latentmill.jobs.outputs.captions import captions_path
from latentmill.jobs.outputs.publish import MANIFEST_PATH, MAX_PART_BYTES, publish
from latentmill.jobs.outputs.verify import VerifyProgress, VerifyReport, verify
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, pictures, run
from tests.jobs.outputs.repairs import repair

pytestmark = pytest.mark.slow

PROMPTS = ["one", "two", "some nsfw", "some poison", "five", "six"]


@pytest.fixture
def out(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> str:
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


def kinds(report: VerifyReport) -> set[str]:
    assert report.exit_code == (1 if report.defects else 0)
    return {defect.kind for defect in report.defects}


def flip(storage: Storage, path: str, position: int) -> None:
    data = bytearray(storage.read(path))
    data[position] ^= 0x10
    storage.write(path, bytes(data))


def rewrite_record(job: Job, chunk: int, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Replace a record by a well-formed, sealed one that says something else."""
    record = job.ledger.read(chunk)
    assert record is not None
    data = encode_record(
        change(record.table.to_pylist()),
        job.ledger.schema,
        chunk=chunk,
        attempt=record.attempt,
        plan_hash=record.plan_hash,
        execution_class=record.execution_class,
        versions={},
    )
    job.storage.write(record_path(chunk), data)


def test_a_sound_output_has_no_defects(out: str) -> None:
    seen: list[VerifyProgress] = []
    report = verify(out, on_progress=seen.append)
    assert report.defects == ()
    assert (report.chunks, report.rows, report.images_checked, report.parts_checked) == (3, 6, 5, 1)
    assert report.bytes_read > 5000
    assert [(step.phase, step.done, step.total) for step in seen[:1]] == [("checking", 0, 3)]
    assert ("checking", 3, 3) in [(step.phase, step.done, step.total) for step in seen]
    assert (seen[-1].phase, seen[-1].done, seen[-1].total, seen[-1].images) == ("comparing", 1, 1, 5)
    assert json.loads(json.dumps(report.to_dict()))["exit_code"] == 0


def test_any_flipped_byte_of_a_picture(out: str) -> None:
    storage = Storage.open(out)
    path, size = next(pictures(storage))
    for position in random.Random(0).sample(range(size), 8):
        flip(storage, path, position)
        (defect,) = verify(out).defects
        assert (defect.kind, defect.path) == ("image-damaged", path)
        flip(storage, path, position)
    assert verify(out).defects == ()


def test_any_flipped_byte_of_a_commit_record(out: str) -> None:
    storage = Storage.open(out)
    path = record_path(1)
    for position in random.Random(0).sample(range(storage.size(path)), 8):
        flip(storage, path, position)
        (defect,) = verify(out).defects
        assert (defect.kind, defect.path) == ("record-damaged", path)
        flip(storage, path, position)


def test_any_flipped_byte_of_a_published_part(out: str) -> None:
    storage = Storage.open(out)
    path, _ = next(storage.list("dataset"))
    for position in random.Random(0).sample(range(storage.size(path)), 8):
        flip(storage, path, position)
        (defect,) = verify(out).defects
        assert (defect.kind, defect.path) == ("part-damaged", path)
        flip(storage, path, position)


def test_captions_that_changed_or_are_not_the_ledgers(out: str) -> None:
    storage = Storage.open(out)
    path = captions_path(0)
    flip(storage, path, 100)
    assert [(defect.kind, defect.path) for defect in verify(out).defects] == [("captions-damaged", path)]
    storage.delete(path)
    assert [(defect.kind, defect.path) for defect in verify(out).defects] == [("captions-damaged", path)]
    manifest = json.loads(storage.read(MANIFEST_PATH))
    manifest["captions"] = []
    storage.write(MANIFEST_PATH, json.dumps(manifest).encode())
    assert [(defect.kind, defect.path) for defect in verify(out).defects] == [("dataset-wrong", MANIFEST_PATH)]


def test_missing_objects(out: str) -> None:
    storage = Storage.open(out)
    path, _ = next(pictures(storage))
    data = storage.read(path)
    storage.delete(path)
    assert [(defect.kind, defect.path) for defect in verify(out).defects] == [("image-missing", path)]
    storage.write(path, data)
    storage.delete(record_path(2))
    assert kinds(verify(out)) == {"chunk-missing"}
    storage.delete(MANIFEST_PATH)
    assert kinds(verify(out)) == {"chunk-missing", "not-published"}


def test_another_picture_with_the_same_digest_claims_is_found_by_its_pixels(out: str) -> None:
    job = open_job(out)
    other = encode_png(np.zeros((64, 64, 3), np.uint8))

    def claim(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        import hashlib

        job.storage.write(rows[0]["image"], other)
        return [{**rows[0], "bytes": len(other), "sha256": hashlib.sha256(other).hexdigest()}, *rows[1:]]

    rewrite_record(job, 0, claim)
    assert "pixels-changed" in kinds(verify(out))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda rows: [rows[0], rows[0]], "row-wrong"),
        (lambda rows: rows[:1], "row-wrong"),
        (lambda rows: rows[::-1], "row-wrong"),
        (lambda rows: [{**rows[0], "prompt": "another prompt"}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "guidance_scale": 3.25}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "seed": 1}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "row_id": "another"}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "status": "failed"}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "status": "fine"}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "nsfw_checker": None}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "nsfw_checker": "none"}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "image": None}, rows[1]], "row-wrong"),
        (lambda rows: [{**rows[0], "prompt_tokens": 99}, rows[1]], "dataset-wrong"),
    ],
)
def test_a_well_formed_record_that_lies(out: str, change: Callable[..., Any], kind: str) -> None:
    rewrite_record(open_job(out), 0, change)
    assert kind in kinds(verify(out))


def test_a_published_part_with_a_duplicated_sample(out: str) -> None:
    """Even with a manifest that was made to match it."""
    import hashlib

    storage = Storage.open(out)
    manifest = json.loads(storage.read(MANIFEST_PATH))
    part = manifest["parts"][0]
    table = pq.read_table(io.BytesIO(storage.read(part["path"])))
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables([table.slice(0, 5), table.slice(4, 1)]), buffer)
    storage.write(part["path"], buffer.getvalue())
    part |= {"bytes": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    storage.write(MANIFEST_PATH, json.dumps(manifest).encode())
    assert kinds(verify(out)) == {"dataset-wrong"}


def test_strays(out: str) -> None:
    storage = Storage.open(out)
    storage.write("ledger/00000/00000003.parquet", storage.read(record_path(0)))
    storage.write("dataset/part-00001-0123456789abcdef.parquet", b"x")
    assert kinds(verify(out)) == {"record-stray", "part-stray"}


def test_a_stray_part_that_no_job_writes_is_a_defect_like_others(out: str) -> None:
    assert repair(out, 1).outcome == "committed"
    publish(open_job(out))
    with (Path(out) / "dataset/part-00001-0123456789abcdef.parquet").open("wb") as file:
        file.truncate(MAX_PART_BYTES + 1)
    assert kinds(verify(out)) == {"part-stray"}


@pytest.mark.parametrize("folder", ["ledger/", "images/", "dataset/part-", "scores/"])
def test_a_store_that_does_not_answer_is_no_defect_of_the_output(out: str, folder: str, monkeypatch) -> None:
    read = Storage.read

    def silent(storage: Storage, path: str, *limit: int) -> bytes:
        if path.startswith(folder):
            raise StorageError("the bucket does not answer", transient=True)
        return read(storage, path, *limit)

    Storage.open(out).write("scores/aesthetic/manifest.json", b"{}")
    monkeypatch.setattr(Storage, "read", silent)
    with pytest.raises(StorageError, match="does not answer"):
        verify(out)


def test_a_sample_of_the_pictures(out: str) -> None:
    assert verify(out, sample_n=2).images_checked <= 2
    storage = Storage.open(out)
    for path, _ in list(pictures(storage)):
        storage.delete(path)
    assert kinds(verify(out, sample_n=3)) == {"image-missing"}
    assert len(verify(out).defects) == 5


@pytest.fixture
def repaired(out: str) -> str:
    """The same output after chunk 1, whose second sample was poison, has been repaired and published again."""
    assert repair(out, 1).outcome == "committed"
    assert kinds(verify(out)) == {"publication-stale"}
    publish(open_job(out))
    return out


def test_a_repaired_output_has_no_defects(repaired: str) -> None:
    report = verify(repaired)
    assert report.defects == ()
    assert (report.rows, report.images_checked, report.repairs, report.parts_checked) == (6, 6, 1, 1)
    assert report.superseded_parts == 0


def rewrite_repair(job: Job, change: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    record = job.ledger.effective(1)
    assert record is not None
    data = encode_record(
        change(record.table.to_pylist()[1]),
        job.ledger.schema,
        chunk=1,
        attempt=record.repaired_by[0],
        plan_hash=record.plan_hash,
        execution_class="fake",
        versions={},
        repair=1,
    )
    job.storage.write(repair_path(1, 1), data)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda row: [{**row, "sample_id": "00000002"}], "repair-wrong"),
        (lambda row: [{**row, "sample_id": "00000004"}], "repair-wrong"),
        (lambda row: [row, row], "repair-wrong"),
        (lambda row: [{**row, "status": "failed"}], "repair-wrong"),
        (lambda row: [], "repair-wrong"),
        (lambda row: [{**row, "prompt": "another"}], "row-wrong"),
        (lambda row: [{**row, "image": None}], "row-wrong"),
        (lambda row: [{**row, "prompt_tokens": 99}], "dataset-wrong"),
        (lambda row: [{**row, "sha256": "0" * 64}], "image-damaged"),
    ],
)
def test_a_well_formed_repair_that_lies(repaired: str, change: Callable[..., Any], kind: str) -> None:
    rewrite_repair(open_job(repaired), change)
    report = verify(repaired)
    assert kind in kinds(report)
    if kind == "repair-wrong":
        assert [(defect.kind, defect.path) for defect in report.defects] == [(kind, repair_path(1, 1))]


def test_a_damaged_lost_or_stray_repair(repaired: str) -> None:
    storage = Storage.open(repaired)
    path, second = repair_path(1, 1), repair_path(1, 2)
    flip(storage, path, 300)
    assert [(defect.kind, defect.path) for defect in verify(repaired).defects] == [("record-damaged", path)]
    flip(storage, path, 300)
    data = storage.read(path)
    storage.delete(path)
    assert [(defect.kind, defect.path) for defect in verify(repaired).defects] == [("dataset-wrong", MANIFEST_PATH)]
    storage.write(second, data)
    found = [(defect.kind, defect.path) for defect in verify(repaired).defects]
    assert found == [("publication-stale", MANIFEST_PATH), ("repair-wrong", path)]
    storage.delete(second)
    storage.write(path, data)
    for stray in (repair_path(3, 1), "ledger/00000/00000001.r0.parquet", "ledger/00000/00000001.r01.parquet"):
        storage.write(stray, data)
        assert [(defect.kind, defect.path) for defect in verify(repaired).defects] == [("record-stray", stray)]
        storage.delete(stray)
    base = storage.read(record_path(1))
    storage.delete(record_path(1))
    found = [(defect.kind, defect.path) for defect in verify(repaired).defects]
    assert found == [("chunk-missing", record_path(1)), ("record-stray", path)]
    storage.write(record_path(1), base)
    assert verify(repaired).defects == ()


def test_only_whole_parts_count_as_those_of_an_earlier_publication(out: str) -> None:
    """Such a part is left by a publisher that was overtaken or killed after its manifest."""
    storage = Storage.open(out)
    (part,) = json.loads(storage.read(MANIFEST_PATH))["parts"]
    old = storage.read(part["path"])
    assert repair(out, 1).outcome == "committed"
    publish(open_job(out))
    storage.write(part["path"], old)
    assert (verify(out).superseded_parts, verify(out).defects) == (1, ())
    flip(storage, part["path"], 100)
    assert [(defect.kind, defect.path) for defect in verify(out).defects] == [("part-stray", part["path"])]
