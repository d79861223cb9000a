"""The whole job on a real S3 server."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.store.storage import Storage
from tests.harness.s3 import S3_SECRET
from tests.jobs.driver import KillAt, job_spec, pictures, read_dataset, run, start
from tests.jobs.fakes import slow_engine

Manifest = Callable[..., Path]
PROMPTS = ["one", "two", "some nsfw", "four", "five"]


def test_a_job_on_s3_equals_the_same_job_on_disk(s3: str, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    prompts = manifest(PROMPTS)
    on_s3 = run(job_spec(tiny_model, prompts, s3))
    run(job_spec(tiny_model, prompts, tmp_path / "out"))
    assert on_s3.exit_code == 0
    assert on_s3.counts == {"ok": 4, "flagged": 1, "failed": 0}
    remote, local = read_dataset(s3), read_dataset(str(tmp_path / "out"))
    assert remote == local
    assert verify(s3).defects == ()
    assert status(s3).state == "published"
    assert run(job_spec(tiny_model, prompts, s3)).generated == 0
    with pytest.raises(OutputConflictError):
        run(job_spec(tiny_model, prompts, s3, seed=1))


def test_no_secret_is_written(s3: str, manifest: Manifest, tiny_model: Path) -> None:
    run(job_spec(tiny_model, manifest(PROMPTS), s3))
    storage = Storage.open(s3)
    paths = [path for path, _ in storage.list("")]
    assert len(paths) > 10
    assert not any(S3_SECRET.encode() in storage.read(path) for path in paths)


@pytest.mark.parametrize("nth", [1, 2])
def test_killed_on_s3_and_resumed(s3: str, nth: int, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    prompts = manifest(PROMPTS)
    spec = job_spec(tiny_model, prompts, s3)
    driver = start(spec, tmp_path / "log", kill_at=KillAt("after", "create", "ledger/", nth))
    driver.join(120)
    assert driver.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert run(spec).exit_code == 0
    run(job_spec(tiny_model, prompts, tmp_path / "whole"))
    assert read_dataset(s3) == read_dataset(str(tmp_path / "whole"))
    assert verify(s3).defects == ()


def test_two_drivers_on_one_bucket(s3: str, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    spec = job_spec(tiny_model, manifest(PROMPTS), s3)
    drivers = [start(spec, tmp_path / "log", engine=slow_engine) for _ in range(2)]
    for driver in drivers:
        driver.join(120)
    assert [driver.exitcode for driver in drivers] == [0, 0], (tmp_path / "log").read_text()
    assert verify(s3).defects == ()


def test_verify_finds_a_flipped_byte_on_s3(s3: str, manifest: Manifest, tiny_model: Path) -> None:
    run(job_spec(tiny_model, manifest(PROMPTS), s3))
    storage = Storage.open(s3)
    path, size = next(pictures(storage))
    data = bytearray(storage.read(path))
    data[size // 2] ^= 1
    storage.write(path, bytes(data))
    assert [(defect.kind, defect.path) for defect in verify(s3).defects] == [("image-damaged", path)]


def test_an_output_that_cannot_be_read_is_a_usage_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for read in (status, verify):
            with pytest.raises(UsageError, match="check the credentials"):
                read(s3)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
