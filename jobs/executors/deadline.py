"""A process that is past its deadline ends itself, even where a library hangs and holds Python's own lock."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within, the process may take so many seconds; then it writes where it stands to its log, and exits with code 1.

    One deadline at a time in a process. The clock is a thread of faulthandler's own, which needs no lock of Python's.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
