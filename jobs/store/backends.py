"""Buckets as storage (folders are in `local.py`): one try per call, with the store's own exceptions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Protocol

from latentmill.jobs.store.errors import FOREIGN_REMEDY, ForeignObjectError, is_refused_create

_CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
"""What a browser must be told of an object, or it saves the page in place of showing it."""

_MODIFIED = ("LastModified", "last_modified", "mtime", "created")
"""What clients call the time at which an object was written: of S3, Azure, GCS, and memory."""


class Backend(Protocol):
    """Calls as the store makes them: one try each, its own exceptions, FileNotFoundError for a missing key.

    `read` raises ForeignObjectError for an object of more than `limit` bytes.
    """

    def read(self, path: str, limit: int) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool: ...
    def link(self, path: str, data: bytes, source: Backend, source_path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def list(self, prefix: str) -> Iterator[tuple[str, int]]: ...
    def list_hidden(self, prefix: str) -> Iterator[tuple[str, int]]: ...
    def list_modified(self, prefix: str) -> Iterator[tuple[str, float]]: ...
    def folders(self, prefix: str) -> Iterator[str]: ...
    def modified(self, path: str) -> float: ...
    def delete(self, path: str) -> None: ...


class ObjectStore:
    """A bucket's prefix through fsspec; `pipe_file` sends whole objects."""

    def __init__(self, fs: Any, root: str, lock: threading.Lock | None) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._lock = lock  # the in-memory store has no conditional write
        # s3fs asks for the size before it reads, to read in parallel; one request is better for small objects
        self._read_options = {"max_concurrency": 1} if "s3" in fs.protocol else {}

    def read(self, path: str, limit: int) -> bytes:
        data: bytes = self._fs.cat_file(self._full(path), **self._read_options)
        if len(data) > limit:
            raise ForeignObjectError(
                f"{path} has {len(data):,} bytes, and at most {limit:,} belong there; {FOREIGN_REMEDY}"
            )
        return data

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._full(path), data, **self._about(path))

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

    def link(self, path: str, data: bytes, source: Backend, source_path: str) -> bool:  # noqa: ARG002
        return False  # objects have one name

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

    def list_modified(self, prefix: str) -> Iterator[tuple[str, float]]:
        for path, info in self._find(prefix):
            if not any(part.startswith(".") for part in path.split("/")):
                moment = next((info[name] for name in _MODIFIED if info.get(name)), None)
                if moment is None:  # a store whose listings do not tell
                    moment = self._fs.modified(self._full(path))
                yield path, float(moment.timestamp() if isinstance(moment, datetime) else moment)

    def folders(self, prefix: str) -> Iterator[str]:
        try:
            entries = self._fs.ls(self._full(prefix), detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] == "directory":
                yield entry["name"].rstrip("/").rpartition("/")[2]

    def modified(self, path: str) -> float:
        modified: float = self._fs.modified(self._full(path)).timestamp()
        return modified

    def delete(self, path: str) -> None:
        try:
            self._fs.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def _about(self, path: str) -> dict[str, Any]:
        """The content type as the client of this store takes it; other files have the store's default."""
        kind = _CONTENT_TYPES.get(PurePosixPath(path).suffix)
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        if kind is None:
            return {}
        if "s3" in protocols:
            return {"ContentType": kind}
        if "gs" in protocols:
            return {"content_type": kind}
        if "abfs" in protocols:
            from azure.storage.blob import ContentSettings

            return {"content_settings": ContentSettings(content_type=kind)}
        return {}

    def _find(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        folder = self._full(prefix.strip("/")) + "/"
        strip = len(self._fs._strip_protocol(self._root)) + 1
        for name, info in sorted(self._fs.find(folder, detail=True).items()):
            if info["type"] == "file":
                yield name[strip:], info

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


class CheckThenWrite:
    """A store without create-only writes: a create checks first, which does not protect against a second driver."""

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
