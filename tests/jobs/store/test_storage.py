"""Local disk, memory and a real S3 server keep the same promises."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.store import storage as storage_module
from latentmill.jobs.store.errors import StorageError, is_transient
from latentmill.jobs.store.storage import Storage
from tests.harness.s3 import S3_READER, S3_SECRET


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(str(tmp_path / "out"))
    if request.param == "memory":
        return Storage.open(f"memory://{secrets.token_hex(6)}")
    return Storage.open(request.getfixturevalue("s3"))


def test_objects_round_trip_and_list(store: Storage) -> None:
    store.write("a/b/one.bin", b"1")
    store.write("a/two.bin", b"22")
    store.write("a/.hidden", b"333")
    store.write("ab/three.bin", b"4444")
    assert sorted(store.list("a")) == [("a/b/one.bin", 1), ("a/two.bin", 2)]
    assert list(store.list("nowhere")) == []
    assert store.read("a/b/one.bin") == b"1"
    assert store.size("a/two.bin") == 2
    assert store.exists("a/two.bin")
    assert not store.exists("a")
    assert not store.exists("a/three.bin")
    store.write("a/two.bin", b"other")
    assert store.read("a/two.bin") == b"other"
    store.delete("a/two.bin")
    store.delete("a/two.bin")
    assert not store.exists("a/two.bin")
    with pytest.raises(FileNotFoundError):
        store.read("a/two.bin")
    with pytest.raises(FileNotFoundError):
        store.size("a")


def test_a_listing_says_when_objects_were_written_and_which_folders_there_are(store: Storage) -> None:
    for path in ("a/b/one", "a/b/deeper/two", "a/c/three", "a/four", "a/b/.hidden", "ab/five"):
        store.write(path, b"x")
    times = dict(store.list_modified("a"))
    assert sorted(times) == ["a/b/deeper/two", "a/b/one", "a/c/three", "a/four"]
    assert times == pytest.approx({path: store.modified(path) for path in times}, abs=1)
    assert all(abs(moment - time.time()) < 60 for moment in times.values())
    assert sorted(store.folders("a")) == ["b", "c"]
    assert store.folders("nowhere") == []
    assert list(store.list_modified("nowhere")) == []


def test_create_is_refused_for_an_existing_object_and_leaves_it(store: Storage) -> None:
    assert store.create("x/record", b"first")
    assert not store.create("x/record", b"second")
    assert store.read("x/record") == b"first"


@pytest.fixture
def _threads_switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_switch_often")
def test_create_has_one_winner_among_threads(store: Storage, tmp_path: Path) -> None:
    rounds, threads = (2, 4) if "s3" in store.url else (40, 8)  # SeaweedFS takes seconds over every loser
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds):
            barrier = threading.Barrier(threads)

            def attempt(name: int, path: str = f"race/{number}", barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return store.create(path, f"attempt {name}".encode())

            wins = list(pool.map(attempt, range(threads)))
            assert sum(wins) == 1
            assert store.read(f"race/{number}") == f"attempt {wins.index(True)}".encode()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "temporary files are left"


def _race(url: str, name: int, rounds: int, start: multiprocessing.Barrier, wins: multiprocessing.Queue) -> None:
    store = Storage.open(url)
    for number in range(rounds):
        start.wait()
        if store.create(f"race/{number}", f"{name}".encode()):
            wins.put((number, name))
    wins.put(None)


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.slow
def test_create_has_one_winner_among_processes(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url, rounds, processes = (str(tmp_path), 60, 4) if place == "local" else (request.getfixturevalue("s3"), 5, 2)
    context = multiprocessing.get_context("spawn")
    start, wins = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_race, args=(url, name, rounds, start, wins)) for name in range(processes)]
    for worker in workers:
        worker.start()
    winners: dict[int, int] = {}
    ended = 0
    while ended < processes:
        won = wins.get(timeout=60)
        if won is None:
            ended += 1
        else:
            assert won[0] not in winners, "two processes created one object"
            winners[won[0]] = won[1]
    for worker in workers:
        worker.join()
    store = Storage.open(url)
    assert {number: store.read(f"race/{number}").decode() for number in range(rounds)} == {
        number: f"{name}" for number, name in winners.items()
    }


def test_a_reader_never_sees_a_half_written_object(tmp_path: Path) -> None:
    store = Storage.open(str(tmp_path))
    sizes = (10, 3_000_000)
    store.write("object", b"a" * sizes[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for size in sizes:
                store.write("object", b"a" * size)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert {len(store.read("object")) for _ in range(200)} <= set(sizes)
    finally:
        stop.set()
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["object"], "temporary files are left"


def test_probe_accepts_real_stores_and_leaves_nothing(store: Storage) -> None:
    store.probe()
    assert list(store.list("_job")) == []


def test_probe_refuses_a_store_that_ignores_create_only(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(path: str, data: bytes) -> bool:
        store._backend.write(path, data)
        return True

    monkeypatch.setattr(store._backend, "create", overwrite)
    with pytest.raises(UsageError, match="ignores create-only writes"):
        store.probe()


def test_storage_travels_by_pickle(store: Storage) -> None:
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_an_empty_create_is_a_mistake_on_object_stores(s3: str) -> None:
    with pytest.raises(ValueError, match="empty create"):
        Storage.open(s3).create("x", b"")


def test_transient_errors_are_retried_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_module, "_sleep", pauses.append)
    store = Storage.open(str(tmp_path))
    calls: list[int] = []

    def flaky(path: str, limit: int) -> bytes:
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionResetError("reset by peer")
        return b"there"

    monkeypatch.setattr(store._backend, "read", flaky)
    assert store.read("x") == b"there"
    assert len(calls) == 4
    assert len(pauses) == 3
    assert pauses[2] > pauses[0] > 0

    def broken(path: str, limit: int) -> bytes:
        calls.append(1)
        raise OSError(28, "No space left on device")

    calls.clear()
    monkeypatch.setattr(store._backend, "read", broken)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        store.read("x")
    assert len(calls) == 1

    def down(path: str, limit: int) -> bytes:
        calls.append(1)
        raise TimeoutError("timed out")

    calls.clear()
    monkeypatch.setattr(store._backend, "read", down)
    with pytest.raises(StorageError, match="check the network"):
        store.read("x")
    assert len(calls) == storage_module.TRIES


class _ClientError(Exception):
    """botocore's error as far as it is looked at."""

    def __init__(self, code: str) -> None:
        self.response = {"Error": {"Code": code}}


def test_a_missing_bucket_is_one_line(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    # the test server makes a bucket of any name, so its refusal is played here
    def create(path: str, data: bytes) -> bool:
        raise FileNotFoundError("The specified bucket does not exist") from _ClientError("NoSuchBucket")

    monkeypatch.setattr(store._backend, "create", create)
    with pytest.raises(UsageError, match=r"NoSuchBucket.*create the bucket") as caught:
        store.probe()
    assert "\n" not in str(caught.value)


def test_a_bucket_without_write_permission_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_READER)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UsageError, match=r"AccessDenied.*grant read, write and list") as caught:
            Storage.open(s3).probe()
        assert "\n" not in str(caught.value)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_wrong_credentials_are_one_line_without_the_secret(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + S3_SECRET)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UsageError, match="check the credentials") as caught:
            Storage.open(s3).probe()
        assert "\n" not in str(caught.value)
        assert S3_SECRET not in repr(caught.getrepr(chain=True))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_an_unreachable_endpoint_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(storage_module, "_sleep", lambda _: None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{S3_SECRET}@127.0.0.1:{closed.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            with pytest.raises(UsageError, match="check the network and the endpoint") as caught:
                Storage.open(s3).probe()
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
    assert S3_SECRET not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="grant read, write and list"):
        Storage.open(str(tmp_path / "out")).probe()


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="a part of the path is a file"):
        Storage.open(str(tmp_path / "file" / "out")).probe()


@pytest.mark.parametrize(
    ("code", "transient"),
    [
        ("SlowDown", True),
        ("503", True),
        ("429", True),
        ("InternalError", True),
        ("AccessDenied", False),
        ("403", False),
    ],
)
def test_store_codes_decide_what_is_transient(code: str, transient: bool) -> None:
    error = OSError("translated")
    error.__cause__ = _ClientError(code)
    assert is_transient(error) is transient


def test_a_browser_is_told_what_a_page_of_a_bucket_is(s3: str):
    storage = Storage.open(s3)
    kinds = {"page.html": "text/html; charset=utf-8", "a.js": "text/javascript; charset=utf-8", "a.webp": "image/webp"}
    for name in kinds:
        storage.write(f"report/{name}", b"bytes")
    client = fsspec.filesystem("s3", use_listings_cache=False)
    for name, kind in kinds.items():
        assert client.info(f"{s3}/report/{name}")["ContentType"] == kind
