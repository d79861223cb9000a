"""A folder on a POSIX disk as storage; no call leaves the folder.

Each part of a path is opened below the one before it, never through a symbolic link (`openat` with O_NOFOLLOW). So
whoever can write into an output cannot redirect a call, not even between a check and the call. Only the root, which
the user chose, may be a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from latentmill.jobs.store.errors import FOREIGN_REMEDY, ForeignObjectError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BELOW = _FOLDER | os.O_NOFOLLOW
_INPUT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # never wait for the writer of a pipe
_OUTPUT = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOENT}
"""A file on another disk, one that may have no further name, a disk without hard links, a file that has gone."""

Publish = Callable[[int, str, str], object]
"""Gives a file its name: the folder's handle, the temporary name, the name."""


class LocalFolder:
    """When a call returns, its data and names are flushed to the disk. Paths have passed `check_name`."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def read(self, path: str, limit: int) -> bytes:
        with self._folder_of(path) as (folder, name):
            handle = self._open(folder, name, _INPUT, path)
        try:
            size = self._regular(path, os.fstat(handle)).st_size
            if size > limit:
                raise self._foreign(path, f"has {size:,} bytes, and at most {limit:,} belong there")
            parts = []
            while size and (part := os.read(handle, size)):
                parts.append(part)
                size -= len(part)
            return b"".join(parts)
        finally:
            os.close(handle)

    def write(self, path: str, data: bytes) -> None:
        self._place(path, data, lambda folder, old, new: os.replace(old, new, src_dir_fd=folder, dst_dir_fd=folder))

    def create(self, path: str, data: bytes) -> bool:
        try:
            # a hard link is the only portable create that is both exclusive and all-or-nothing
            self._place(
                path,
                data,
                lambda folder, old, new: os.link(old, new, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False),
            )
        except FileExistsError:
            self._regular(path, self._look_up(path))
            return False
        return True

    def link(self, path: str, data: bytes, source: object, source_path: str) -> bool:
        if not isinstance(source, LocalFolder):
            return False
        with source._folder_of(source_path) as (theirs, old), self._folder_of(path, make=True) as (folder, name):
            temporary = f".{name}.{secrets.token_hex(6)}.tmp"
            try:
                os.link(old, temporary, src_dir_fd=theirs, dst_dir_fd=folder, follow_symlinks=False)
                # what was linked is looked at, not what lay there before
                if not self._holds(folder, temporary, path, data):
                    return False
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except OSError as error:
                if error.errno in _NO_LINK:
                    return False
                raise
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
        return True

    def _holds(self, folder: int, name: str, path: str, data: bytes) -> bool:
        """Whether it is a regular file with these bytes."""
        try:
            handle = self._open(folder, name, _INPUT, path)
        except ForeignObjectError:
            return False
        with os.fdopen(handle, "rb") as file:
            return os.fstat(handle).st_size == len(data) and file.read(len(data)) == data

    def size(self, path: str) -> int:
        status = self._look_up(path)
        if stat.S_ISDIR(status.st_mode):
            raise FileNotFoundError(path)
        return self._regular(path, status).st_size

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((path, status.st_size) for path, status in self._walk(prefix, hidden=False))

    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((path, status.st_size) for path, status in self._walk(prefix, hidden=True))

    def list_modified(self, prefix: str) -> Iterator[tuple[str, float]]:
        return ((path, status.st_mtime) for path, status in self._walk(prefix, hidden=False))

    def folders(self, prefix: str) -> Iterator[str]:
        with (
            contextlib.suppress(FileNotFoundError),
            self._folder(prefix.split("/")) as handle,
            os.scandir(handle) as entries,
        ):
            yield from (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def modified(self, path: str) -> float:
        return self._look_up(path).st_mtime

    def delete(self, path: str) -> None:
        try:
            with self._folder_of(path) as (folder, name):
                os.unlink(name, dir_fd=folder)  # of a link: the link itself
        except FileNotFoundError:
            return

    def _walk(self, prefix: str, *, hidden: bool) -> Iterator[tuple[str, os.stat_result]]:
        """The paths of everything below a folder except folders; links and pipes included."""
        folders = [prefix]
        while folders:
            folder = folders.pop()
            found = []
            try:
                with self._folder(folder.split("/") if folder else []) as handle, os.scandir(handle) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        dotted = entry.name.startswith(".")
                        if entry.is_dir(follow_symlinks=False):
                            if hidden or not dotted:
                                folders.append(path)
                        elif dotted == hidden:
                            with contextlib.suppress(
                                FileNotFoundError
                            ):  # a temporary file that was just renamed or removed
                                found.append((path, entry.stat(follow_symlinks=False)))
            except FileNotFoundError:
                continue
            yield from found

    def _place(self, path: str, data: bytes, publish: Publish) -> None:
        with self._folder_of(path, make=True) as (folder, name):
            temporary = f".{name}.{secrets.token_hex(6)}.tmp"
            try:
                with os.fdopen(os.open(temporary, _OUTPUT, 0o666, dir_fd=folder), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                publish(folder, temporary, name)
                os.fsync(folder)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)

    def _look_up(self, path: str) -> os.stat_result:
        with self._folder_of(path) as (folder, name):
            return os.stat(name, dir_fd=folder, follow_symlinks=False)

    @contextmanager
    def _folder_of(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        *folders, name = path.split("/")
        with self._folder(folders, make=make) as folder:
            yield folder, name

    @contextmanager
    def _folder(self, names: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """A handle of the folder below the root; with `make` it is created, durably."""
        handle = self._open_root(make=make)
        try:
            for depth, name in enumerate(names, start=1):
                below = self._step(handle, name, "/".join(names[:depth]), make=make)
                os.close(handle)
                handle = below
            yield handle
        finally:
            os.close(handle)

    def _step(self, folder: int, name: str, path: str, *, make: bool) -> int:
        try:
            return self._open(folder, name, _BELOW, path)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):  # another process has just made it
            os.mkdir(name, dir_fd=folder)
            os.fsync(folder)
        return self._open(folder, name, _BELOW, path)

    def _open(self, folder: int, name: str, flags: int, path: str) -> int:
        try:
            return os.open(name, flags, dir_fd=folder)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENXIO}:  # a link, a link to a folder, a socket
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not (flags & os.O_DIRECTORY and stat.S_ISREG(status.st_mode)):
                    self._regular(path, status)
            raise

    def _open_root(self, *, make: bool) -> int:
        try:
            return os.open(self._root, _FOLDER)
        except FileNotFoundError:
            if not make:
                raise
        missing, folder = [], self._root
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            sync_folder(new.parent)
        return os.open(self._root, _FOLDER)

    def _regular(self, path: str, status: os.stat_result) -> os.stat_result:
        """The same status. Raises ForeignObjectError for anything but a regular file."""
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise self._foreign(path, f"is {kind}")
        return status

    def _foreign(self, path: str, fault: str) -> ForeignObjectError:
        return ForeignObjectError(f"{self._root / path} {fault}; {FOREIGN_REMEDY}")


_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}


def sync_folder(folder: Path) -> None:
    """Afterwards the names in the folder are on the disk."""
    handle = os.open(folder, _FOLDER)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
