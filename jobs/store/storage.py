"""The one interface to disks and object stores: whole objects, and a create that only one caller wins.

Nothing here streams into an output: fsspec commits a partial object when an exception leaves `with fs.open(…, "wb")`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from latentmill.jobs.errors import UsageError
from latentmill.jobs.store.backends import Backend, CheckThenWrite, ObjectStore
from latentmill.jobs.store.errors import (
    FOREIGN_REMEDY,
    ForeignObjectError,
    NotShownError,
    StorageError,
    describe,
    is_inside,
    is_transient,
    knows_no_create,
    remedy,
    store_code,
)
from latentmill.jobs.store.local import LocalFolder
from latentmill.jobs.store.urls import allowed_filesystem, display_url

T = TypeVar("T")

PATIENCE_SECONDS = 90.0
"""How long a call that fails transiently is tried again: a server's restart, or a minute of "slow down"."""

TRIES = 24
"""At most so many tries. With a quarter of all answers faulty, a call then fails once in 10^14."""

LARGEST = 2 << 30
"""Bytes of the largest object that a job writes; callers may pass a smaller limit."""

SINGLE_WRITER_PATH = "_job/single-writer.txt"
"""Marks an output whose store has no create-only writes, for every process that opens it."""

_SINGLE_WRITER_TEXT = (
    b"The store of this dataset ignores create-only writes (If-None-Match), so its commit records are looked for and "
    b"then written. That is safe for one driver at a time; --single-writer promised that there is never a second.\n"
)
_NOTE_BYTES = 10_000
_FIRST, _SECOND = b"first", b"second"
_SILENCE_SECONDS = 5.0
_LONGEST_PAUSE = 5.0

_WRITING = frozenset({"write", "create", "write to"})

_log = logging.getLogger(__name__)
_sleep = time.sleep
_clock = time.monotonic
_memory_lock = threading.Lock()


class Storage:
    """One output root. Paths are relative and '/'-separated; picklable; safe to share between threads.

    No call leaves the root: a path that would, a symbolic link below it, or anything but a regular file in an object's
    place is a ForeignObjectError. Every call retries what is transient, with growing, jittered pauses, and says so when
    it takes long. What remains is a FileNotFoundError for a missing key, or a StorageError of one line without
    credentials.
    """

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        self._raw_url = url
        self.url = display_url(url)
        self.single_writer = single_writer
        fs, root = allowed_filesystem(url, repeats=True)
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._backend: Backend
        if protocols & {"file", "local"}:
            self._backend = LocalFolder(root)
        else:
            self._backend = ObjectStore(fs, root, _memory_lock if "memory" in protocols else None)
        if single_writer:
            self._backend = CheckThenWrite(self._backend)

    @classmethod
    def open(cls, url: str) -> Storage:
        """The storage behind an allowed URL or path; nothing is touched yet."""
        return cls(url)

    @classmethod
    def of_output(cls, url: str) -> Storage:
        """The storage of an existing output, which records whether creates must check before they write."""
        storage = cls.open(url)
        try:
            storage.read(SINGLE_WRITER_PATH, _NOTE_BYTES)  # not looked up: S3 answers a refused HEAD without saying why
        except FileNotFoundError:
            return storage
        return cls(url, single_writer=True)

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[str, bool]]:
        return (_reopened, (self._raw_url, self.single_writer))

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def read(self, path: str, limit: int = LARGEST) -> bytes:
        """The whole object. Raises ForeignObjectError if it has more than `limit` bytes; a disk then reads none."""
        return self._patiently("read", path, lambda: self._backend.read(path, limit))

    def write(self, path: str, data: bytes) -> None:
        """Afterwards the object holds `data`, durably; a reader sees the old bytes or the new ones, never a mixture."""
        self._patiently("write", path, lambda: self._backend.write(path, data))

    def link(self, path: str, data: bytes, source: Storage, source_path: str) -> bool:
        """Afterwards the object is another name of one in `source`, if that holds `data` and lies on the same disk.

        False if that cannot be; then nothing is there.
        """
        return self._patiently("write", path, lambda: self._backend.link(path, data, source._backend, source_path))

    def create(self, path: str, data: bytes) -> bool:
        """Put if absent: True if this call made the object, durably; False if there is one.

        After a lost answer the object may be this call's own although it says False: compare the content if it matters.
        """
        return self._patiently("create", path, lambda: self._backend.create(path, data))

    def exists(self, path: str) -> bool:
        """Whether the object exists (a folder is not an object)."""
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

    def list_modified(self, prefix: str) -> Iterator[tuple[str, float]]:
        """What `list` has, with the time at which each was last written, as `modified` says it."""
        yield from self._patiently("list", prefix, lambda: list(self._backend.list_modified(prefix)))

    def folders(self, prefix: str) -> Sequence[str]:
        """The names of the folders in a folder, in any order; of a bucket, by one request for a thousand of them."""
        return self._patiently("list", prefix, lambda: list(self._backend.folders(prefix)))

    def modified(self, path: str) -> float:
        """When the object was last written, in seconds since 1970 by the store's clock."""
        return self._patiently("look up", path, lambda: self._backend.modified(path))

    def delete(self, path: str) -> None:
        """Afterwards the object does not exist."""
        self._patiently("delete", path, lambda: self._backend.delete(path))

    def probe(self, *, allow_single_writer: bool = False) -> Storage:
        """The storage that a job may write to: this user can write, read and list, and a key is created only once.

        With `allow_single_writer` a store whose create overwrites is accepted too; its creates then check before
        they write. Raises UsageError otherwise; no probe is left.
        """
        path = f"_job/.probe-{secrets.token_hex(8)}"

        def read_back() -> bytes:
            try:
                return self._backend.read(path, _NOTE_BYTES)
            except FileNotFoundError as error:
                if store_code(error) == "NoSuchBucket":
                    raise
                raise NotShownError("it does not show what was written to it") from error

        def list_back() -> None:
            if path not in dict(self._backend.list_hidden("_job")):
                raise NotShownError("it does not show what was written to it")

        try:
            self._create_twice(path)
            back = self._patiently("read from", path, read_back)
            self._patiently("list", "_job", list_back)
        except FileNotFoundError as error:
            raise UsageError(f"cannot write to {self.url}: {describe(error)}; {remedy(error)}") from error
        except StorageError as error:
            raise UsageError(str(error)) from error
        with contextlib.suppress(StorageError):  # a store that forbids deletion keeps the probe, which no reader sees
            self._patiently("delete", path, lambda: self._backend.delete(path))
        if back == _FIRST:  # the stored content decides: an answer may have been lost
            return self
        if not allow_single_writer:
            raise UsageError(
                f"{self.url} ignores create-only writes (If-None-Match), without which two workers could overwrite "
                "each other; use a store that honours them (a local disk, S3, GCS, Azure, SeaweedFS, MinIO), or "
                "promise by --single-writer that no second driver will ever run on it"
            )
        _log.warning("%s ignores create-only writes: two drivers at once would not be safe there", self.url)
        return Storage(self._raw_url, single_writer=True)

    def _create_twice(self, path: str) -> None:
        """Afterwards the object holds `_FIRST` if the store refuses a second create, `_SECOND` if it does not."""
        for content in (_FIRST, _SECOND):
            try:
                self._patiently("write to", path, partial(self._backend.create, path, content))
            except StorageError as error:
                if error.__cause__ is None or not knows_no_create(error.__cause__):
                    raise
                self._patiently("write to", path, partial(self._backend.write, path, content))

    def mark_single_writer(self) -> None:
        """Afterwards the output is marked, if its store has no create-only writes."""
        if self.single_writer and not self.exists(SINGLE_WRITER_PATH):
            self.write(SINGLE_WRITER_PATH, _SINGLE_WRITER_TEXT)

    def _patiently(self, verb: str, path: str, call: Callable[[], T]) -> T:
        if not is_inside(path) and not (verb == "list" and path == ""):
            raise ForeignObjectError(f"{path!r} is no name of an object in {self.url}; {FOREIGN_REMEDY}")
        started, told = _clock(), False
        for failures in range(1, TRIES + 1):
            try:
                return call()
            except FileNotFoundError as error:
                if store_code(error) != "NoSuchBucket" and verb not in _WRITING:
                    raise  # an object that is not there; what cannot be written lacks its bucket
                raise self._error(verb, path, error) from error
            except Exception as error:  # fsspec's backends share no base class; anything not transient is re-raised
                if isinstance(error, ValueError | TypeError | AttributeError | ForeignObjectError):
                    raise
                waited = _clock() - started
                if not is_transient(error) or failures == TRIES or waited >= PATIENCE_SECONDS:
                    raise self._error(verb, path, error) from error
                if waited >= _SILENCE_SECONDS and not told:
                    told = True
                    _log.warning(
                        "cannot %s %s in %s: %s; trying on for %.0f s",
                        verb,
                        path,
                        self.url,
                        describe(error),
                        PATIENCE_SECONDS,
                    )
            _sleep(min(_LONGEST_PAUSE, 0.2 * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))  # noqa: S311
        raise AssertionError("unreachable")

    def _error(self, verb: str, path: str, error: Exception) -> StorageError:
        return StorageError(
            f"cannot {verb} {path} in {self.url}: {describe(error)}; {remedy(error)}", transient=is_transient(error)
        )


def _reopened(url: str, single_writer: bool) -> Storage:
    return Storage(url, single_writer=single_writer)
