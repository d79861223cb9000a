"""The one door to disks and object stores: whole objects in, whole objects out, and a create that has one winner.

Nothing here streams into an output: fsspec commits a partial object when an exception leaves `with fs.open(…, "wb")`.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from jobs.errors import UsageError
from jobs.store.errors import StorageError, describe, is_refused_create, is_transient, remedy, store_code
from jobs.store.urls import allowed_filesystem, display_url

T = TypeVar("T")

TRIES = 7
"""Attempts at a call that fails transiently; with the pauses between them about 15 s in all."""

_sleep = time.sleep
_memory_lock = threading.Lock()


class _Backend(Protocol):
    """Calls as the store makes them: one try each, its own exceptions, FileNotFoundError for a missing key."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool: ...
    def size(self, path: str) -> int: ...
    def list(self, prefix: str) -> Iterator[tuple[str, int]]: ...
    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]: ...
    def modified(self, path: str) -> float: ...
    def delete(self, path: str) -> None: ...
    def open_input(self, path: str) -> IO[bytes]: ...


class _Local:
    """A folder on a POSIX file system. What a call returns from has been flushed to the disk, names included."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        self._place(path, data, lambda temporary, target: temporary.replace(target))

    def create(self, path: str, data: bytes) -> bool:
        try:
            # a hard link is the only portable create that is both exclusive and all-or-nothing
            self._place(path, data, lambda temporary, target: target.hardlink_to(temporary))
        except FileExistsError:
            if (self._root / path).is_file():
                return False
            raise
        return True

    def size(self, path: str) -> int:
        target = self._root / path
        if target.is_dir():
            raise FileNotFoundError(path)
        return target.stat().st_size

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        folders = [prefix.strip("/")]
        while folders:
            folder = folders.pop()
            try:
                entries = sorted(os.scandir(self._root / folder), key=lambda entry: entry.name)
            except FileNotFoundError:
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                else:
                    yield path, entry.stat().st_size

    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]:
        for folder, _, names in os.walk(self._root / prefix):
            for path in (Path(folder, name) for name in sorted(names) if name.startswith(".")):
                with contextlib.suppress(FileNotFoundError):  # a temporary file whose writer has just finished
                    yield path.relative_to(self._root).as_posix(), path.stat(follow_symlinks=False).st_size

    def modified(self, path: str) -> float:
        return (self._root / path).stat().st_mtime

    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    def open_input(self, path: str) -> IO[bytes]:
        return (self._root / path).open("rb")

    def _place(self, path: str, data: bytes, publish: Callable[[Path, Path], object]) -> None:
        target = self._root / path
        self._make_folder(target.parent)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)


class _ObjectStore:
    """A bucket's prefix through fsspec; `pipe_file` sends whole objects."""

    def __init__(self, fs: Any, root: str, lock: threading.Lock | None) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._lock = lock  # the in-memory store has no conditional write of its own
        # s3fs asks for the size before it reads, to read in parallel; one request is better for small objects
        self._read_options = {"max_concurrency": 1} if "s3" in fs.protocol else {}

    def read(self, path: str) -> bytes:
        data: bytes = self._fs.cat_file(self._full(path), **self._read_options)
        return data

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._full(path), data)

    def create(self, path: str, data: bytes) -> bool:
        if not data:
            raise ValueError(f"{path}: an empty create is not exclusive on every store")
        full = self._full(path)
        if self._lock is not None:
            with self._lock:
                if self._fs.exists(full):
                    return False
                self._fs.pipe_file(full, data)
                return True
        try:
            self._fs.pipe_file(full, data, mode="create")
        except Exception as error:
            if is_refused_create(error):
                return False
            raise
        return True

    def size(self, path: str) -> int:
        info = self._fs.info(self._full(path))
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        for path, info in self._find(prefix):
            if not any(part.startswith(".") for part in path.split("/")):
                yield path, int(info["size"])

    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]:
        for path, info in self._find(prefix):
            if path.rpartition("/")[2].startswith("."):
                yield path, int(info["size"])

    def modified(self, path: str) -> float:
        modified: float = self._fs.modified(self._full(path)).timestamp()
        return modified

    def delete(self, path: str) -> None:
        try:
            self._fs.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def open_input(self, path: str) -> IO[bytes]:
        file: IO[bytes] = self._fs.open(self._full(path), "rb")
        return file

    def _find(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        folder = self._full(prefix.strip("/")) + "/"
        strip = len(self._fs._strip_protocol(self._root)) + 1
        for name, info in sorted(self._fs.find(folder, detail=True).items()):
            if info["type"] == "file":
                yield name[strip:], info

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


class Storage:
    """One output root. Paths are relative and '/'-separated; picklable; safe to share between threads.

    Every call retries what is transient, with growing, jittered pauses. What remains is a FileNotFoundError for a
    missing key, or a StorageError of one line without credentials.
    """

    def __init__(self, url: str) -> None:
        self._raw_url = url
        self.url = display_url(url)
        fs, root = allowed_filesystem(url)
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._backend: _Backend
        if protocols & {"file", "local"}:
            self._backend = _Local(root)
        else:
            self._backend = _ObjectStore(fs, root, _memory_lock if "memory" in protocols else None)

    @classmethod
    def open(cls, url: str) -> Storage:
        """The storage behind an allowed URL or path; nothing is touched yet."""
        return cls(url)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return (Storage, (self._raw_url,))

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def read(self, path: str) -> bytes:
        """The whole object."""
        return self._patiently("read", path, lambda: self._backend.read(path))

    def write(self, path: str, data: bytes) -> None:
        """Afterwards the object holds `data`, durably; a reader sees the old bytes or the new ones, never a mixture."""
        self._patiently("write", path, lambda: self._backend.write(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Put if absent: True if this call made the object, durably; False if there is one.

        After a lost answer the object may be this call's own although it says False: whoever must know, compares.
        """
        return self._patiently("create", path, lambda: self._backend.create(path, data))

    def exists(self, path: str) -> bool:
        """Whether there is such an object (a folder is none)."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """The object's size in bytes."""
        return self._patiently("look up", path, lambda: self._backend.size(path))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Path and size of every object under a folder, recursively; names that begin with a dot are skipped."""
        yield from self._patiently("list", prefix, lambda: list(self._backend.list(prefix)))

    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Path and size of what `list` skips under a folder: objects whose names begin with a dot."""
        yield from self._patiently("list", prefix, lambda: list(self._backend.list_hidden(prefix)))

    def modified(self, path: str) -> float:
        """When the object was last written, in seconds since 1970 by the store's clock."""
        return self._patiently("look up", path, lambda: self._backend.modified(path))

    def delete(self, path: str) -> None:
        """Afterwards there is no such object."""
        self._patiently("delete", path, lambda: self._backend.delete(path))

    def open_input(self, path: str) -> IO[bytes]:
        """The object as a seekable binary file, for readers of Parquet."""
        return self._patiently("open", path, lambda: self._backend.open_input(path))

    def probe(self) -> None:
        """Returns if this user can write here and a second create of one key is refused; a UsageError otherwise."""
        path = f"_job/.probe-{secrets.token_hex(8)}"
        try:
            first, second = (self._patiently("write to", path, _create(self._backend, path), tries=3) for _ in range(2))
        except FileNotFoundError as error:
            raise UsageError(f"cannot write to {self.url}: {describe(error)}; {remedy(error)}") from error
        except StorageError as error:
            raise UsageError(str(error)) from error
        self._tidy(path)
        if not first or second:
            raise UsageError(
                f"{self.url} ignores create-only writes (If-None-Match), without which two workers could overwrite "
                "each other; use a store that honours them: a local disk, S3, GCS, Azure, SeaweedFS, MinIO"
            )

    def _tidy(self, path: str) -> None:
        try:
            self.delete(path)
        except StorageError:
            return  # a store that forbids deletion keeps the probe, whose dot-name every reader skips

    def _patiently(self, verb: str, path: str, call: Callable[[], T], *, tries: int = TRIES) -> T:
        for failures in range(1, tries + 1):
            try:
                return call()
            except FileNotFoundError as error:
                if store_code(error) != "NoSuchBucket":
                    raise
                raise self._error(verb, path, error) from error
            except Exception as error:  # fsspec's backends share no base class; anything not transient is re-raised
                if isinstance(error, ValueError | TypeError | AttributeError):
                    raise
                if not is_transient(error) or failures == tries:
                    raise self._error(verb, path, error) from error
            _sleep(min(5.0, 0.2 * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))  # noqa: S311
        raise AssertionError("unreachable")

    def _error(self, verb: str, path: str, error: Exception) -> StorageError:
        return StorageError(f"cannot {verb} {path} in {self.url}: {describe(error)}; {remedy(error)}")


def _create(backend: _Backend, path: str) -> Callable[[], bool]:
    return lambda: backend.create(path, b"probe")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
