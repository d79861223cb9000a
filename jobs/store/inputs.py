"""Files that a user names, to be read: what any disk or store raises of them becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.store.errors import describe
from latentmill.jobs.store.urls import allowed_filesystem


@contextmanager
def reading(what: str, missing: str = "does not exist; check the path") -> Iterator[None]:
    """Within, what a disk or a store raises is a UsageError of one line that begins with `what`."""
    try:
        yield
    except JobError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{what} {missing}") from None
    except Exception as error:  # every store's library has its own tree of exceptions for "cannot read"
        raise UsageError(f"{what} cannot be read ({describe(error)}); check address, rights and credentials") from error


def read_small(place: str, what: str, most: int, *, remedy: str, too_large: str) -> bytes:
    """A whole file of up to `most` bytes. Raises UsageError: `what`, what is wrong, and `remedy` or `too_large`."""
    fs, path = allowed_filesystem(place)
    with reading(what, f"does not exist; {remedy}"):
        info = fs.info(path)
        if info["type"] != "file":
            raise UsageError(f"{what} is no regular file; {remedy}")
        if info["size"] > most:
            raise UsageError(f"{what} has more than {most:,} bytes; {too_large}")
        data: bytes = fs.cat_file(path)
    return data
