"""The two streams of the command: a line of our own words, and an end to what libraries write between them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from latentmill.jobs.errors import JobError


def print_line(text: str, *, error: bool = False) -> None:
    """One line of our own words, in which untrusted parts already went through `safe`; nothing is read as markup."""
    stream = sys.stderr if error else sys.stdout
    stream.write(text + "\n")
    stream.flush()


@contextmanager
def held_back_stderr() -> Iterator[None]:
    """Within, nothing reaches standard error, C++ included; it is shown after all when an exception is not ours."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except JobError:
            raise
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            os.write(real, held.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)
