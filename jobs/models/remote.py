"""Files at a URL: their names, sizes and versions, and their download, hashed on the way."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.models.digests import Identity, identity_of
from latentmill.jobs.store.errors import StorageError, describe, is_inside, is_transient, store_code
from latentmill.jobs.store.urls import allowed_filesystem, display_url

MAX_FILES = 10_000
TRIES = 5
"""Attempts at one piece of a file, in addition to the client's own."""

_PIECE = 32 * 2**20
_THREADS = 4
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)
_sleep = time.sleep


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One object. `version` is the store's identifier of its content; empty if the store has none."""

    size: int
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """A downloaded file: its hash, and its identity on the disk."""

    sha256: str
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class RemoteTree:
    """The files below a URL, by relative path."""

    url: str
    files: Mapping[str, RemoteFile]

    @cached_property
    def fingerprint(self) -> str | None:
        """Changes if any file does; None if the store gives no version of some file."""
        if not all(file.version for file in self.files.values()):
            return None
        lines = [f"{name}\0{file.size}\0{file.version}" for name, file in sorted(self.files.items())]
        return hashlib.sha256("\n".join([self.url, *lines]).encode()).hexdigest()[:40]


def list_tree(url: str) -> RemoteTree:
    """All files below a URL. Raises UsageError if there are none, or more than a model can have."""
    fs, root = allowed_filesystem(url)
    try:
        found = _patiently(url, lambda: fs.find(root, detail=True))
    except FileNotFoundError:
        found = {}
    prefix = root.rstrip("/") + "/"
    files = {
        name.removeprefix(prefix): _remote_file(info)
        for name, info in found.items()
        if info["type"] == "file" and name.startswith(prefix)
    }
    if not files:
        raise UsageError(f"there is nothing at {display_url(url)}; check the address, and that it may be listed")
    if len(files) > MAX_FILES:
        raise UsageError(f"{display_url(url)} holds {len(files):,} files, no model has more than {MAX_FILES:,}")
    safe = {name: file for name, file in files.items() if is_inside(name) and "\\" not in name}
    return RemoteTree(url=url, files=safe)


def find_file(url: str) -> RemoteTree:
    """One file as a tree: its folder, without the other files. Raises UsageError if it is missing."""
    fs, path = allowed_filesystem(url)
    parent, _, name = url.rpartition("/")
    try:
        info = _patiently(url, lambda: fs.info(path))
    except FileNotFoundError:
        info = {"type": "nothing"}
    if info["type"] != "file":
        raise UsageError(f"there is no file {display_url(url)}; check the address")
    return RemoteTree(url=parent, files={name: _remote_file(info)})


def download(tree: RemoteTree, names: Iterable[str], folder: Path) -> dict[str, Fetched]:
    """Afterwards the files are below `folder`, durably, with the sizes that the store reported.

    Raises JobError if the disk has no room for them, StorageError if the store fails.
    """
    names = sorted(names)
    missing = [name for name in names if name not in tree.files]
    if missing:
        raise JobError(
            f"{display_url(tree.url)} lacks {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which the job "
            f"was planned with; put back what was there, or use a new --out"
        )
    try:
        _check_room(sum(tree.files[name].size for name in names), folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fs, root = allowed_filesystem(tree.url)
        with ThreadPoolExecutor(_THREADS) as pool:
            fetched = pool.map(
                lambda name: _download_file(fs, f"{root.rstrip('/')}/{name}", tree, name, folder / name), names
            )
            return dict(zip(names, fetched, strict=True))
    except OSError as error:
        raise JobError(
            f"the model cannot be kept in {folder.parent}: {describe(error)}; free some space there, or name another "
            f"folder by LATENTMILL_CACHE"
        ) from error


def _download_file(fs: Any, source: str, tree: RemoteTree, name: str, target: Path) -> Fetched:
    digest, size = hashlib.sha256(), tree.files[name].size
    url = f"{tree.url}/{name}"
    with target.open("xb") as file:
        for start in range(0, size, _PIECE):
            piece = _patiently(url, _piece_reader(fs, source, start, min(start + _PIECE, size)))
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return Fetched(sha256=digest.hexdigest(), identity=identity_of(os.fstat(file.fileno())))


def _piece_reader(fs: Any, source: str, start: int, end: int) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            piece: bytes = fs.cat_file(source, start=start, end=end)
        except FileNotFoundError as error:
            raise StorageError(f"{source} was removed while it was read; put it back, and run again") from error
        if len(piece) != end - start:
            raise ConnectionError(f"{len(piece):,} bytes came instead of {end - start:,}")
        return piece

    return read


def _patiently(url: str, call: Callable[[], Any]) -> Any:
    """The call's result, repeated while the store's error is transient. FileNotFoundError is raised at once."""
    for failures in range(1, TRIES + 1):
        try:
            return call()
        except FileNotFoundError as error:
            if store_code(error) != "NoSuchBucket":
                raise
            raise _failure(url, error) from error
        except Exception as error:  # fsspec's backends share no base class; anything not transient is re-raised
            if isinstance(error, ValueError | TypeError | AttributeError | JobError):
                raise
            if not is_transient(error) or failures == TRIES:
                raise _failure(url, error) from error
        _sleep(min(5.0, 0.2 * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))  # noqa: S311
    raise AssertionError("unreachable")


def _failure(url: str, error: Exception) -> StorageError:
    return StorageError(
        f"cannot read {display_url(url)}: {describe(error)}; check the address, the credentials in the environment or "
        f"the profile (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID), and the endpoint (AWS_ENDPOINT_URL)"
    )


def _remote_file(info: Mapping[str, Any]) -> RemoteFile:
    version = next((f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key)), "")
    return RemoteFile(size=int(info["size"]), version=version)


def _check_room(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise JobError(
            f"the model takes {size / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB left; free some space "
            f"there, or name another folder by LATENTMILL_CACHE"
        )
