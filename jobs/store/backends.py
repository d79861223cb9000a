"""Where objects lie: a folder on a disk, or a bucket. One try a call, with the place's own exceptions."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from latentmill.jobs.store.errors import is_refused_create


class Backend(Protocol):
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


class LocalFolder:
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


class ObjectStore:
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


class CheckThenWrite:
    """A store without create-only writes: a create looks first. Between two drivers that is no protection."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def create(self, path: str, data: bytes) -> bool:
        try:
            self._backend.size(path)
        except FileNotFoundError:
            self._backend.write(path, data)
            return True
        return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
