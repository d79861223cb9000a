"""Disks that fill up, fail or turn read-only under a job, keys that expire, buckets that vanish: real ones."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.errors import StorageError, remedy
from latentmill.jobs.store.storage import Storage
from tests.harness.s3 import S3_KEY, S3_SECRET, credentials, seaweedfs, set_identities
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import FakeEngine

Manifest = Callable[..., Path]
PROMPTS = ["one", "two", "some nsfw", "four", "five", "six"]
WORKER = "latentmill-worker"


@dataclass
class SaboteurEngine(FakeEngine):
    """Does something to the world before its second chunk."""

    act: Callable[[], object] = lambda: None
    calls: Iterator[int] = itertools.count

    def generate(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        if next(self.calls) == 1:
            self.act()
        return super().generate(requests)


def break_in_the_middle(spec: JobSpec, act: Callable[[], object], words: str) -> None:
    """The job ends with one line that says these words, and goes no further than the chunks in flight."""
    engines: list[SaboteurEngine] = []

    def engine(plan: Any, device: str) -> SaboteurEngine:
        engines.append(SaboteurEngine(batch_size=plan.batch_size, act=act, calls=itertools.count()))
        return engines[0]

    with pytest.raises(StorageError, match=words) as caught:
        run(spec, engine_factory=engine)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 1


def check_resumed(spec: JobSpec, whole: Path) -> None:
    """The same command resumes, and nothing shows what happened."""
    assert run(spec).exit_code == 0
    assert verify(spec.out).defects == ()
    assert run(spec).generated == 0
    run(replace(spec, out=str(whole)))
    assert read_dataset(spec.out) == read_dataset(str(whole))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own; it is in memory."""
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a disk needs root and a kernel that lets it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the space there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def test_a_disk_that_fills_up(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "4m") as folder:
        spec = job_spec(tiny_model, manifest(PROMPTS), folder / "out")
        break_in_the_middle(spec, lambda: fill(folder), "No space left on device; free some space.*it resumes")
        assert not list((folder / "out").rglob(".*.tmp")), "a temporary file is left"
        with pytest.raises(UsageError, match="No space left on device"):
            run(spec)
        (folder / "ballast").unlink()
        check_resumed(spec, tmp_path / "whole")


def test_a_disk_that_turns_read_only(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "4m") as folder:
        spec = job_spec(tiny_model, manifest(PROMPTS), folder / "out")
        words = "Read-only file system; the file system is read-only: make it writable"
        mount("-o", "remount,ro", str(folder))
        with pytest.raises(UsageError, match=words):
            run(spec)
        mount("-o", "remount,rw", str(folder))
        break_in_the_middle(spec, lambda: mount("-o", "remount,ro", str(folder)), words)
        assert Storage.open(spec.out).exists("_job/plan.json")
        mount("-o", "remount,rw", str(folder))
        check_resumed(spec, tmp_path / "whole")


def test_a_disk_that_fails(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    """A block device whose blocks cannot be written: its image lies on a disk that is full by then."""
    with ExitStack() as undo:
        backing = undo.enter_context(disk(tmp_path / "backing", "3m"))
        image, folder = backing / "image", tmp_path / "disk"
        folder.mkdir()
        try:
            with image.open("wb") as file:
                file.truncate(24 << 20)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)], check=True, capture_output=True)
            mount("-o", "loop", str(image), str(folder))
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this machine lends no loop device")
        undo.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        spec = job_spec(tiny_model, manifest(PROMPTS), folder / "out")
        # The kernel says EIO, or passes on the ENOSPC of the disk behind the loop device: both were seen.
        words = r"Input/output error; the disk fails \(see the system's log\): repair it|No space left on device; free"
        break_in_the_middle(spec, lambda: fill(backing), words)
        (backing / "ballast").unlink()
        check_resumed(spec, tmp_path / "whole")


def test_an_error_of_the_device_is_told_as_one() -> None:
    assert remedy(OSError(errno.EIO, "Input/output error")).startswith("the disk fails (see the system's log): repair")


def test_a_limit_on_the_size_of_files(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    spec = job_spec(tiny_model, manifest(PROMPTS), tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        shrink = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # noqa: E731
        break_in_the_middle(spec, shrink, r"File too large; files may not grow so large here.*ulimit -f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_resumed(spec, tmp_path / "whole")


def user(secret: str, *actions: str) -> list[dict[str, object]]:
    keys = [{"accessKey": WORKER, "secretKey": secret}]
    return [{"name": "worker", "credentials": keys, "actions": list(actions)}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of this module's own, whose users change."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    with seaweedfs(folder) as url:
        yield url, folder


@pytest.fixture
def bucket(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A new bucket, which a user who is no administrator may read, write and list; the answer is its owner's view."""
    url, folder = server
    for name, value in {**credentials(url), "AWS_ACCESS_KEY_ID": WORKER, "AWS_SECRET_ACCESS_KEY": "first"}.items():
        monkeypatch.setenv(name, value)
    set_identities(folder, user("first", "Read", "Write", "List", "Tagging"))
    session = boto3.Session(S3_KEY, S3_SECRET, region_name="us-east-1")
    bucket = session.resource("s3", endpoint_url=url).create_bucket(Bucket=f"bucket-{os.urandom(4).hex()}")
    s3fs.S3FileSystem.clear_instance_cache()
    yield bucket
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.s3
@pytest.mark.long
def test_keys_that_expire(
    server: tuple[str, Path],
    bucket: Any,
    manifest: Manifest,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = job_spec(tiny_model, manifest(PROMPTS), f"s3://{bucket.name}/out")
    rotate = lambda: set_identities(server[1], user("second", "Read", "Write", "List", "Tagging"))  # noqa: E731
    break_in_the_middle(spec, rotate, r"SignatureDoesNotMatch.*check the credentials.*it resumes")
    with pytest.raises(UsageError, match="check the credentials"):
        run(spec)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "second")
    s3fs.S3FileSystem.clear_instance_cache()
    check_resumed(spec, tmp_path / "whole")


@pytest.mark.s3
def test_a_bucket_that_vanishes(bucket: Any, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    spec = job_spec(tiny_model, manifest(PROMPTS), f"s3://{bucket.name}/out")

    def vanish() -> None:
        bucket.objects.all().delete()
        bucket.delete()

    break_in_the_middle(spec, vanish, "NoSuchBucket.*create the bucket|AccessDenied.*grant")
    with pytest.raises(UsageError, match=r"NoSuchBucket.*create the bucket|AccessDenied.*grant"):
        run(spec)
    with pytest.raises(StorageError, match="NoSuchBucket"):
        list(Storage.open(spec.out).list("ledger/00000"))
    bucket.create()
    bucket.objects.all().delete()  # what was under way while it vanished may have come to be all the same
    check_resumed(spec, tmp_path / "whole")


def test_an_output_that_is_emptied_in_the_middle(s3: str, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    """An administrator's writes make a deleted bucket again, so only what is missing tells."""
    spec, storage = job_spec(tiny_model, manifest(PROMPTS), s3), Storage.open(s3)

    def empty() -> None:
        while not storage.exists("ledger/00000/00000000.parquet"):
            time.sleep(0.05)
        for path, _ in list(storage.list("")):
            storage.delete(path)

    with pytest.raises(JobError, match=r"_job/plan.json has vanished.*run the same command again"):
        run(spec, engine_factory=lambda plan, _: SaboteurEngine(batch_size=2, act=empty, calls=itertools.count()))
    check_resumed(spec, tmp_path / "whole")


@pytest.mark.s3
def test_a_user_who_may_not_list(server: tuple[str, Path], bucket: Any, manifest: Manifest, tiny_model: Path) -> None:
    set_identities(server[1], user("first", "Read", "Write"))
    with pytest.raises(UsageError, match=r"cannot list _job .*AccessDenied.*grant read, write and list"):
        run(job_spec(tiny_model, manifest(PROMPTS), f"s3://{bucket.name}/out"))
