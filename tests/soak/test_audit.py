"""The audit has teeth: each invariant, broken by hand in a finished output, is named, and a sound one is not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import pictures
from tests.soak.audit import Finished, audit, check, neighbours, run_cli
from tests.soak.jobs import fake_job
from tests.soak.watch import Watch

pytestmark = pytest.mark.long

RECORD = "ledger/00000/00000001.parquet"
MANIFEST = "_job/dataset.json"


@pytest.fixture(scope="module")
def finished(s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A small job's output on the S3 server, and the same on disk."""
    folder = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        job = fake_job(folder, random.Random(3), 24)
        out = "s3://test/audit/out"
        Storage.open("s3://test/audit").write("out-other", b"somebody else's")
        before = neighbours(out)
        code = run_cli(job, out)[0]
        calm = run_cli(job, str(folder / "calm"))[0]
        assert code == calm == 1  # there are poisoned rows
        (folder / "cwd").mkdir()
        watch = Watch(out)
        watch.look([])
        yield Finished(
            job=job,
            out=out,
            reference=str(folder / "calm"),
            reference_exit_code=calm,
            exit_codes=(1, 1),
            watch=watch,
            neighbours=before,
            working_folders=(folder / "cwd",),
        )


def test_a_sound_output_passes(finished: Finished):
    assert {name: wrong for name, wrong in audit(finished).items() if wrong} == {}


def an_image(storage: Storage) -> str:
    return next(pictures(storage))[0]


DAMAGE: dict[str, Callable[[Storage], object]] = {
    "I1": lambda storage: storage.delete(RECORD),
    "I2": lambda storage: storage.write(an_image(storage), b"not this picture"),
    "I3": lambda storage: storage.write(an_image(storage), b"not this picture"),
    "I4": lambda storage: Storage.open("s3://test/audit").write("out-other", b"touched"),
    "I6": lambda storage: storage.delete(an_image(storage)),
    "I7": lambda storage: storage.delete("_job/plan.json"),
    "I8": lambda storage: (storage.delete(RECORD), storage.delete(MANIFEST)),
    "I9": lambda storage: storage.delete(MANIFEST),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_invariant_is_checked_on_its_own(finished: Finished, name: str):
    storage, beside = Storage.open(finished.out), Storage.open("s3://test/audit")
    kept = {path: storage.read(path) for path, _ in storage.list("")}
    try:
        DAMAGE[name](storage)
        found = check(name, finished)
        assert found
        assert not any("cannot be checked" in wrong for wrong in found)
    finally:
        for path, _ in list(storage.list("")):
            if path not in kept:
                storage.delete(path)
        for path, data in kept.items():
            storage.write(path, data)
        beside.write("out-other", b"somebody else's")


def test_a_driver_that_ends_otherwise_is_told(finished: Finished):
    assert check("I9", replace(finished, exit_codes=(1, 0))) == ["a driver ended with 0, an undisturbed run with 1"]


def test_the_watch_sees_what_was_undone_and_made_good_again(finished: Finished, tmp_path: Path):
    """A record overwritten by another attempt's is sound in itself: only who saw the first one knows."""
    storage, watch = Storage.open(finished.out), Watch(finished.out)
    watch.look([])
    record, image = storage.read(RECORD), an_image(storage)
    picture = storage.read(image)
    storage.write(RECORD, storage.read("ledger/00000/00000002.parquet"))
    watch.look([RECORD])
    storage.delete(RECORD)
    storage.delete(image)
    watch.look([])
    storage.write(RECORD, record)
    storage.write(image, picture)
    assert {violation[:2] for violation in watch.violations} == {"I5", "I6"}
    assert any("has changed" in violation for violation in watch.violations)
    assert any("is gone" in violation for violation in watch.violations)
