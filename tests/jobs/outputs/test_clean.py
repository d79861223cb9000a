"""`clean` removes what lost and what was left behind, and never what a dataset may still need."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.errors import OutputConflictError
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.ledger import record_path, repair_path
from latentmill.jobs.ledger.picture_store import attempt_folder
from latentmill.jobs.outputs import clean as clean_module
from latentmill.jobs.outputs.clean import GRACE_SECONDS, clean
from latentmill.jobs.outputs.publish import MANIFEST_PATH, publish
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import postprocess_chunk
from tests.jobs.driver import PROCESSES, job_spec, pictures, read_dataset, run
from tests.jobs.outputs.repairs import repair, start_repair

pytestmark = pytest.mark.slow

PROMPTS = ["one", "two", "some nsfw", "some poison", "five", "six"]
LOSER, OTHER = "0123456789abcdef", "fedcba9876543210"
Manifest = Callable[..., Path]


@pytest.fixture
def out(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> str:
    """A finished job of three chunks."""
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


def leave_behind(storage: Storage, chunk: int, attempt: str = LOSER, images: int = 2) -> set[str]:
    paths = {f"{attempt_folder(chunk, attempt)}/{number:08d}.png" for number in range(images)}
    for path in paths:
        storage.write(path, b"x" * 100)
    return paths


def everything(storage: Storage) -> set[str]:
    return {path for path, _ in storage.list("")} | {path for path, _ in storage.list_hidden("")}


def test_attempts_that_lost_are_removed_and_nothing_else(out: str) -> None:
    storage = Storage.open(out)
    before, dataset = everything(storage), read_dataset(out)
    lost = leave_behind(storage, 0) | leave_behind(storage, 0, OTHER) | leave_behind(storage, 2)
    removed = clean(out, dry_run=True)
    assert (removed.attempts, removed.images, removed.objects, removed.bytes, removed.exit_code) == (3, 6, 6, 600, 0)
    assert everything(storage) == before | lost
    assert clean(out).to_dict() == {**removed.to_dict(), "dry_run": False}
    assert everything(storage) == before
    assert clean(out).objects == 0
    assert read_dataset(out) == dataset
    assert verify(out).defects == ()


def test_attempts_at_open_chunks_are_kept(out: str) -> None:
    storage = Storage.open(out)
    storage.delete(record_path(1))
    lost = leave_behind(storage, 0)
    leave_behind(storage, 1)
    before = everything(storage)
    report = clean(out)
    assert (report.attempts, report.open_attempts) == (1, 2)
    assert everything(storage) == before - lost


def test_what_is_not_ours_is_left_alone(out: str) -> None:
    storage = Storage.open(out)
    folder = attempt_folder(0, LOSER)
    for path in (
        "images/notes.txt",
        "images/00000/00000000-mine/a.png",
        "images/00001/00000000-0123456789abcdef/a.png",
        f"images/00000/{0:08d}-r1-{LOSER}/a.png",
        f"{folder}/deeper/a.png",
        "images/00000/00000007-0123456789abcdef/a.png",
        "dataset/notes.txt",
        "_job/.notes",
        ".a.0123456789ab.tmp",
    ):
        storage.write(path, b"x")
    before = everything(storage)
    assert clean(out, grace_seconds=-10).objects == 0
    assert everything(storage) == before


def test_leftovers_are_removed_once_they_are_old(out: str) -> None:
    storage = Storage.open(out)
    before = everything(storage)
    kinds = {
        "parts": "dataset/part-00000-0123456789abcdef.parquet",
        "temporary_files": "images/00000/00000000-0123456789abcdef/.00000000.png.0123456789ab.tmp",
        "probes": "_job/.probe-0123456789abcdef",
    }
    for path in kinds.values():
        storage.write(path, b"x" * 10)
    assert clean(out).objects == 0
    for path in kinds.values():
        old = storage.modified(path) - GRACE_SECONDS - 1
        os.utime(Path(out, path), (old, old))
    for dry_run in (True, False):
        report = clean(out, dry_run=dry_run)
        assert {kind: getattr(report, kind) for kind in kinds} == dict.fromkeys(kinds, 1)
        assert (report.objects, report.bytes) == (3, 30)
    assert everything(storage) == before


def test_the_age_of_leftovers_is_told_by_the_stores_clock(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(out)
    storage.write("_job/.probe-0123456789abcdef", b"x")
    monkeypatch.setattr(clean_module.time, "time", lambda: 4e9)
    assert clean(out).objects == 0


def test_parts_are_kept_while_no_publication_stands(out: str) -> None:
    storage = Storage.open(out)
    storage.delete(MANIFEST_PATH)
    before = everything(storage)
    assert clean(out, grace_seconds=-10).objects == 0
    assert everything(storage) == before


def test_a_damaged_record_protects_its_chunk(out: str) -> None:
    storage = Storage.open(out)
    kept, lost = leave_behind(storage, 0), leave_behind(storage, 1)
    storage.write(record_path(0), storage.read(record_path(0))[:-1])
    report = clean(out)
    assert (report.unreadable_chunks, report.attempts, report.exit_code) == ((0,), 1, 1)
    assert kept <= everything(storage)
    assert lost.isdisjoint(everything(storage))


def test_another_plans_record_stops_clean(out: str, tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    storage, other = Storage.open(out), str(tmp_path / "other")
    run(job_spec(tiny_model, manifest(PROMPTS), other, seed=7))
    storage.write(record_path(0), Storage.open(other).read(record_path(0)))
    kept = leave_behind(storage, 0)
    with pytest.raises(OutputConflictError):
        clean(out)
    assert kept <= everything(storage)


def test_a_cleaning_that_is_killed_in_the_middle_is_harmless(out: str) -> None:
    storage = Storage.open(out)
    before, dataset = everything(storage), read_dataset(out)
    lost = leave_behind(storage, 0, images=20)
    cleaner = PROCESSES.Process(target=_clean_and_die, args=(out,))
    cleaner.start()
    cleaner.join(60)
    assert cleaner.exitcode == -signal.SIGKILL
    left = everything(storage)
    assert before < left < before | lost
    assert verify(out).defects == ()
    assert clean(out).images == len(left - before)
    assert everything(storage) == before
    assert read_dataset(out) == dataset


def _clean_and_die(out: str) -> None:
    delete, calls = Storage.delete, []

    def deadly(self: Storage, path: str) -> None:
        calls.append(path)
        if len(calls) > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        delete(self, path)

    Storage.delete = deadly  # type: ignore[method-assign]
    clean(out)


def test_cleaning_beside_running_drivers(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    spec = job_spec(tiny_model, manifest(24), out)
    run(job_spec(tiny_model, manifest(24), tmp_path / "whole"))
    stop, removed = threading.Event(), []

    def clean_again() -> None:
        while not stop.is_set():
            if Path(out, "_job/plan.json").exists():
                removed.append(clean(out).images)

    cleaner = threading.Thread(target=clean_again)
    cleaner.start()
    try:
        drivers = [threading.Thread(target=run, args=(spec,)) for _ in range(2)]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
    finally:
        stop.set()
        cleaner.join()
    clean(out)
    assert len(removed) > 1
    assert verify(out).defects == ()
    assert read_dataset(out) == read_dataset(str(tmp_path / "whole"))
    referenced = read_dataset(out).rows.num_rows
    assert len(list(pictures(Storage.open(out)))) == referenced


def test_on_s3(s3: str, tiny_model: Path, manifest: Manifest) -> None:
    run(job_spec(tiny_model, manifest(PROMPTS), s3))
    storage = Storage.open(s3)
    before, dataset = everything(storage), read_dataset(s3)
    lost = leave_behind(storage, 0) | leave_behind(storage, 2)
    strays = {"_job/.probe-0123456789abcdef", "dataset/part-00000-0123456789abcdef.parquet"}
    for path in strays:
        storage.write(path, b"x")
    assert clean(s3, dry_run=True).attempts == 2
    assert everything(storage) == before | lost | strays
    report = clean(s3)
    assert (report.attempts, report.images, report.objects) == (2, 4, 4)
    assert everything(storage) == before | strays
    assert clean(s3, grace_seconds=-10).objects == 2
    assert everything(storage) == before
    assert read_dataset(s3) == dataset
    assert verify(s3).defects == ()


def leave_repair_behind(storage: Storage, chunk: int, number: int, attempt: str = LOSER) -> str:
    path = f"{attempt_folder(chunk, attempt, number)}/{3:08d}.png"
    storage.write(path, b"x" * 100)
    return path


def test_attempts_at_repairs_that_lost_are_removed_and_nothing_else(out: str) -> None:
    storage = Storage.open(out)
    early = start_repair(out, 1)
    lost = {leave_repair_behind(storage, 1, 1)}
    assert clean(out).open_attempts == 1, "no repair stands yet: the attempt may still win"
    assert repair(out, 1).outcome == "committed"
    before = everything(storage)
    assert postprocess_chunk(open_job(out), early).outcome == "lost"
    late = everything(storage) - before
    assert len(late) == 1
    assert "-r1-" in next(iter(late))
    kept = {leave_repair_behind(storage, 1, 2), leave_repair_behind(storage, 0, 1)}
    before = everything(storage)
    removed = clean(out, dry_run=True)
    assert (removed.attempts, removed.images, removed.open_attempts, removed.exit_code) == (2, 2, 2, 0)
    assert everything(storage) == before
    assert clean(out).to_dict() == {**removed.to_dict(), "dry_run": False}
    assert everything(storage) == before - lost - late
    assert kept <= everything(storage)
    publish(open_job(out))
    assert verify(out).defects == ()


def test_a_damaged_repair_protects_its_chunk(out: str) -> None:
    storage = Storage.open(out)
    repair(out, 1)
    kept = leave_behind(storage, 1) | {leave_repair_behind(storage, 1, 1)}
    storage.write(repair_path(1, 1), storage.read(repair_path(1, 1))[:-1])
    report = clean(out)
    assert (report.unreadable_chunks, report.attempts, report.exit_code) == ((1,), 0, 1)
    assert kept <= everything(storage)


def test_parts_of_a_publication_before_are_removed_once_they_are_old(out: str) -> None:
    """As they are left by a publisher that was killed after its manifest, or that was overtaken."""
    storage = Storage.open(out)
    (old,) = {path for path, _ in storage.list("dataset")} - {MANIFEST_PATH}
    data = storage.read(old)
    repair(out, 1)
    assert clean(out, grace_seconds=-10).parts == 0, (
        "the publication that names it does not stand, but it is the only one"
    )
    publish(open_job(out))
    storage.write(old, data)
    assert clean(out).parts == 0
    assert clean(out, grace_seconds=-10).parts == 1
    assert old not in everything(storage)
    assert verify(out).superseded_parts == 0
    assert verify(out).defects == ()
