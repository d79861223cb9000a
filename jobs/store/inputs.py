"""Files that a user names, to be read: what any disk or store raises of them becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.store.errors import describe


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
