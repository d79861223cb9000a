"""A folder on a disk is the only thing that its storage touches, whatever lies in it."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.store.errors import ForeignObjectError, StorageError
from latentmill.jobs.store.storage import Storage

CALLS: dict[str, Callable[[Storage, str], object]] = {
    "read": lambda store, path: store.read(path),
    "write": lambda store, path: store.write(path, b"ours"),
    "create": lambda store, path: store.create(path, b"ours"),
    "exists": lambda store, path: store.exists(path),
    "size": lambda store, path: store.size(path),
    "list": lambda store, path: list(store.list(path)),
    "list_hidden": lambda store, path: list(store.list_hidden(path)),
    "list_modified": lambda store, path: list(store.list_modified(path)),
    "list_folders": lambda store, path: store.folders(path),
    "modified": lambda store, path: store.modified(path),
    "delete": lambda store, path: store.delete(path),
}
NAMES = ["/etc/hostname", "../outside/x", "a/../../outside/x", "a//x", "a/./x", "./x", "..", ".", "a/", "a/\0x"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "x").write_text("precious")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    store = Storage.open(str(tmp_path / "root"))
    store.write("a/x", b"x")
    return store


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verb", CALLS)
def test_no_call_takes_a_name_that_leads_out_of_the_root(
    verb: str, name: str, tmp_path: Path, outside: Path, store: Storage
) -> None:
    for place in (store, Storage.open("memory://names")):
        with pytest.raises(ForeignObjectError, match="is no name of an object in") as caught:
            CALLS[verb](place, name)
        assert str(caught.value).isprintable()
    assert (outside / "x").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "outside", "root", "x", "x"]


@pytest.mark.parametrize("place", ["link", "a/link"])
@pytest.mark.parametrize("verb", CALLS)
def test_no_call_follows_a_symbolic_link_below_the_root(
    verb: str, place: str, tmp_path: Path, outside: Path, store: Storage
) -> None:
    (tmp_path / "root" / place).symlink_to(outside)
    path = place if verb.startswith("list") else f"{place}/x"
    with pytest.raises(ForeignObjectError, match=rf"{place} is a symbolic link; .*remove it"):
        CALLS[verb](store, path)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("x", "precious")]
    assert sum(1 for _ in store.list("")) == 2, "the link has a name here, and nothing behind it has"


@pytest.mark.parametrize("target", ["x", "nowhere"])
def test_a_link_in_an_objects_place_is_replaced_or_removed_or_refused(
    target: str, tmp_path: Path, outside: Path, store: Storage
) -> None:
    link = tmp_path / "root" / "a" / "link"
    for verb in ("read", "create", "exists", "size"):
        link.symlink_to(outside / target)
        with pytest.raises(ForeignObjectError, match="a/link is a symbolic link"):
            CALLS[verb](store, "a/link")
        assert link.is_symlink()
        store.delete("a/link")
        assert not link.is_symlink()
    link.symlink_to(outside / target)
    store.write("a/link", b"ours")
    assert not link.is_symlink()
    assert store.read("a/link") == b"ours"
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("x", "precious")]


def test_the_root_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = Storage.open(str(tmp_path / "link"))
    assert store.create("a/b/x", b"1")
    assert (tmp_path / "real/a/b/x").read_bytes() == b"1"
    assert store.probe() is store


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "no regular file"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage.open(str(tmp_path))
    if kind == "a pipe":
        os.mkfifo(tmp_path / "thing")
    elif kind == "a folder":
        (tmp_path / "thing").mkdir()
    else:
        monkeypatch.chdir(tmp_path)  # a socket's path may not be long
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("thing")
    for verb in ("read", "create"):
        with pytest.raises(ForeignObjectError, match=f"thing is {kind}"):
            CALLS[verb](store, "thing")


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root")
def test_a_device_is_not_read(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "zero", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this kernel lets nobody make a device")
    with pytest.raises(ForeignObjectError, match="zero is no regular file"):
        Storage.open(str(tmp_path)).read("zero")


def test_no_more_is_read_than_was_asked_for(store: Storage, tmp_path: Path) -> None:
    assert store.read("a/x", 1) == b"x"
    with pytest.raises(ForeignObjectError, match="has 1 bytes, and at most 0 belong there"):
        store.read("a/x", 0)
    with (tmp_path / "root/a/x").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ForeignObjectError, match="1,099,511,627,776 bytes"):
        store.read("a/x")


def test_what_vanishes_while_it_is_listed_is_not_listed(tmp_path: Path) -> None:
    store, stop = Storage.open(str(tmp_path)), threading.Event()
    for number in range(50):
        store.write(f"still/{number}", b"x")

    def come_and_go() -> None:
        while not stop.is_set():
            for name in ("file", ".file", "folder/file", "folder/.file"):
                (tmp_path / "still" / name).parent.mkdir(exist_ok=True)
                (tmp_path / "still" / name).write_bytes(b"x")
            for name in ("file", ".file", "folder/file", "folder/.file"):
                (tmp_path / "still" / name).unlink()
            (tmp_path / "still/folder").rmdir()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(200):
            assert sum(1 for path, _ in store.list("still") if "f" not in path) == 50
            list(store.list_hidden(""))
    finally:
        stop.set()
        other.join()


def test_a_folder_that_becomes_a_link_in_the_middle_leads_nowhere(tmp_path: Path, outside: Path) -> None:
    """The race that a check beforehand would lose: every answer is the file inside, or a refusal."""
    store, stop = Storage.open(str(tmp_path / "root")), threading.Event()
    store.write("a/x", b"inside")
    folder, aside, link = (tmp_path / "root" / name for name in ("a", "aside", "link"))
    link.symlink_to(outside)

    def put(path: Path) -> None:
        """Where nothing has the name for a moment, a write may have made a folder of it: out with that one."""
        while path.is_symlink() or path.exists():
            try:
                path.rename(folder)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)

    def swap() -> None:
        while not stop.is_set():
            folder.rename(aside)
            put(link)
            folder.rename(link)
            put(aside)

    other = threading.Thread(target=swap)
    other.start()
    answers: set[object] = set()
    try:
        for _ in range(3000):
            try:
                answers.add(store.read("a/x"))
                store.write("a/y", b"ours")
            except (StorageError, FileNotFoundError) as error:
                answers.add(type(error))
            except OSError as error:
                pytest.fail(f"{error!r}")
    finally:
        stop.set()
        other.join()
    assert b"inside" in answers
    assert answers <= {b"inside", ForeignObjectError, StorageError, FileNotFoundError}
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("x", "precious")]


def test_a_link_is_another_name_of_the_same_bytes_or_nothing_at_all(tmp_path: Path):
    ours, theirs = Storage.open(str(tmp_path / "ours")), Storage.open(str(tmp_path / "theirs"))
    theirs.write("a/picture", b"bytes")
    assert ours.link("b/picture", b"bytes", theirs, "a/picture")
    assert (tmp_path / "ours/b/picture").samefile(tmp_path / "theirs/a/picture")
    assert ours.link("b/picture", b"bytes", theirs, "a/picture"), "a second try after a lost answer"
    (tmp_path / "theirs/a/link").symlink_to("picture")
    for refused in (("x", b"other", "a/picture"), ("x", b"bytes", "a/gone"), ("x", b"bytes", "a/link")):
        assert not ours.link(refused[0], refused[1], theirs, refused[2])
    assert [path.name for path in (tmp_path / "ours").rglob("*")] == ["b", "picture"]
    assert not ours.link("x", b"bytes", Storage.open("memory://theirs"), "a/picture")
