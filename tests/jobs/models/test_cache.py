"""Models at URLs: downloaded once per node, whole or not at all, and never trusted after something touched them."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.models import cache, digests, node, remote
from latentmill.jobs.models.cache import fetch_newest, hold
from latentmill.jobs.models.digests import file_digest
from latentmill.jobs.models.node import one_at_a_time
from latentmill.jobs.store.storage import Storage
from tests.jobs.models.machines import start_holder

FILES = {"model_index.json": b"{}", "unet/config.json": b"[1]", "unet/weights.safetensors": bytes(range(256)) * 400}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def node_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node that has no model yet."""
    monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of files in the memory of this process."""
    place = f"memory://models-{secrets.token_hex(4)}/sd"
    put(place, FILES)
    yield place
    fsspec.filesystem("memory").rm(place, recursive=True)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every read of an object in memory, by path."""
    seen: list[str] = []
    original = MemoryFileSystem.cat_file

    def counted(self, path, *rest, **more):
        seen.append(path)
        return original(self, path, *rest, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    return seen


def put(place: str, files: dict[str, bytes]) -> None:
    storage = Storage.open(place)
    for name, data in files.items():
        storage.write(name, data)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_what_is_held_is_not_fetched_again(node_cache, url, reads):
    folder = hold(url, DIGESTS)
    assert contents(folder) == FILES
    assert len(reads) == len(FILES)
    assert hold(url, DIGESTS) == folder
    assert fetch_newest(url) == folder  # the same content, found under its own digest
    assert [entry.name for entry in (node_cache / "models").iterdir()] == [folder.name]


def test_planning_twice_downloads_once_and_reads_again_what_changed(node_cache, url, reads):
    first = fetch_newest(url)
    fetched = len(reads)
    assert fetch_newest(url) == first
    assert len(reads) == fetched
    put(url, {"unet/config.json": b"[2]"})
    assert (fetch_newest(url) / "unet/config.json").read_bytes() == b"[2]"
    assert (first / "unet/config.json").read_bytes() == b"[1]"


def _flip(path: Path) -> None:
    """One byte, in place, with the times put back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES = {
    "flipped": _flip,
    "truncated": lambda path: os.truncate(path, 1000),
    "deleted": Path.unlink,
    "never completed": lambda path: (path.parents[1] / ".complete").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_found_and_fetched_again(damage, node_cache, url, reads):
    folder = hold(url, DIGESTS)
    DAMAGES[damage](folder / "unet/weights.safetensors")
    assert contents(hold(url, DIGESTS)) == FILES
    assert len(reads) == 2 * len(FILES)
    assert [entry.name for entry in (node_cache / "models").iterdir()] == [folder.name]


def test_a_source_that_changed_since_the_plan_is_refused(node_cache, url):
    put(url, {"unet/config.json": b"[2]"})
    with pytest.raises(JobError) as caught:
        hold(url, DIGESTS)
    words = [f"unet/config.json at {url}", DIGESTS["unet/config.json"], hashlib.sha256(b"[2]").hexdigest(), "new --out"]
    assert all(word in str(caught.value) for word in [*words, node.node_name()])
    assert list((node_cache / "models").iterdir()) == []
    Storage.open(url).delete("unet/config.json")
    with pytest.raises(JobError, match=r"lacks unet/config\.json"):
        hold(url, DIGESTS)


def test_pieces_that_fail_or_come_short_are_asked_for_again(node_cache, url, monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 10_000)
    monkeypatch.setattr(remote, "_sleep", lambda _: None)
    original, calls = MemoryFileSystem.cat_file, []

    def flaky(self, path, start=None, end=None):
        calls.append(start)
        if len(calls) % 3 == 1:
            raise ConnectionResetError("reset by peer")
        data = original(self, path, start, end)
        return data[:-1] if len(calls) % 3 == 2 else data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    monkeypatch.setattr(remote, "_THREADS", 1)
    assert contents(hold(url, DIGESTS)) == FILES
    assert len(calls) == 3 * (2 + -(-len(FILES["unet/weights.safetensors"]) // 10_000))


def test_a_store_that_only_ever_comes_short_is_an_error_of_one_line(node_cache, url, monkeypatch):
    monkeypatch.setattr(remote, "_sleep", lambda _: None)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: b"x")
    with pytest.raises(JobError, match=r"1 bytes came instead of \d.*AWS_PROFILE") as caught:
        hold(url, DIGESTS)
    assert "\n" not in str(caught.value)
    assert list((node_cache / "models").iterdir()) == []


def test_names_that_leave_the_folder_are_not_followed(node_cache, tmp_path, monkeypatch):
    outside = {"/b/m/../../outside.json": 3, "/b/m//x.json": 3, "/b/m/ok.json": 2}
    listing = {path: {"name": path, "type": "file", "size": size} for path, size in outside.items()}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: listing)
    tree = remote.list_tree("memory://b/m")
    assert list(tree.files) == ["ok.json"]
    assert tree.fingerprint is None  # nothing says which version it is: nothing may be remembered


def test_a_place_without_files_or_with_far_too_many_is_refused(node_cache, url, monkeypatch):
    with pytest.raises(UsageError, match="there is nothing at memory://nowhere/x"):
        fetch_newest("memory://nowhere/x")
    with pytest.raises(UsageError, match=r"there is no file memory://nowhere/x\.ckpt"):
        fetch_newest("memory://nowhere/x.ckpt")
    monkeypatch.setattr(remote, "MAX_FILES", 2)
    with pytest.raises(UsageError, match="holds 3 files"):
        fetch_newest(url)


def test_a_full_disk_or_an_unwritable_cache_says_what_to_do(node_cache, url, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(JobError, match=r"has 0\.0 GB left; .*LATENTMILL_CACHE"):
        hold(url, DIGESTS)
    monkeypatch.setenv("LATENTMILL_CACHE", "/dev/null/cache")
    with pytest.raises(JobError, match=r"/dev/null/cache: Not a directory; .*LATENTMILL_CACHE"):
        hold(url, DIGESTS)


def test_a_user_without_a_home_has_no_cache_and_local_models_all_the_same(node_cache, tmp_path, url, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LATENTMILL_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    (tmp_path / "file").write_bytes(FILES["model_index.json"])
    assert file_digest(tmp_path / "file") == DIGESTS["model_index.json"]
    with pytest.raises(JobError, match="name another folder by LATENTMILL_CACHE"):
        hold(url, DIGESTS)


def test_a_file_is_hashed_once_and_again_when_it_was_touched(node_cache, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(FILES["unet/weights.safetensors"])
    opened: list[Path] = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: opened.append(path) or read(path))
    assert file_digest(path) == file_digest(path) == DIGESTS["unet/weights.safetensors"]
    assert len(opened) == 2  # too young to be remembered: the clock of a file system has coarse ticks
    monkeypatch.setattr(digests, "_SETTLED_NANOSECONDS", 0)
    assert {file_digest(path) for _ in range(3)} == {DIGESTS["unet/weights.safetensors"]}
    assert len(opened) == 3
    _flip(path)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest() != DIGESTS["unet/weights.safetensors"]
    monkeypatch.setattr(digests, "node_name", lambda: "another-node-with-the-same-home")
    file_digest(path)
    assert len(opened) == 5
    for note in (node_cache / "digests").iterdir():
        note.write_text('{"half')
    file_digest(path)
    assert len(opened) == 6


def test_a_lock_is_waited_for_and_not_for_ever(node_cache):
    with one_at_a_time("key") as first:
        assert first
        with one_at_a_time("key", patience=0.2) as second:
            assert not second
        with one_at_a_time("other") as third:
            assert third
    with one_at_a_time("key") as again:  # the file is still there, and no lock
        assert again


@pytest.mark.slow
def test_four_processes_at_once_download_once(s3, node_cache):
    put(f"{s3}/model", FILES)
    holders = [start_holder(f"{s3}/model", DIGESTS, node_cache) for _ in range(4)]
    for holder in holders:
        holder.stdin.write("go\n")
        holder.stdin.flush()
    answers = [json.loads(holder.communicate(timeout=60)[0]) for holder in holders]
    assert {answer["path"] for answer in answers} == {str(hold(f"{s3}/model", DIGESTS))}
    assert sorted(answer["reads"] for answer in answers) == [0, 0, 0, len(FILES)]
    assert contents(Path(answers[0]["path"])) == FILES


def test_a_download_that_is_killed_leaves_nothing_that_is_trusted(s3, node_cache):
    put(f"{s3}/model", FILES)
    holder = start_holder(f"{s3}/model", DIGESTS, node_cache, stop_after=2)
    holder.stdin.write("go\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "in the middle\n"
    holder.kill()
    holder.communicate(timeout=60)
    (left,) = (node_cache / "models").iterdir()
    assert len([path for path in left.rglob("*") if path.is_file()]) >= 2
    assert contents(hold(f"{s3}/model", DIGESTS)) == FILES
    assert [entry.name for entry in (node_cache / "models").iterdir()] == [cache.listing_digest(DIGESTS)]
