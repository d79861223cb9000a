"""What every executor does: run chunks through `worker.py`, in any order, and hand back one receipt for each try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from jobs.worker import Receipt


class Executor(Protocol):
    """Somewhere to run chunks. It may drop or repeat chunks: the ledger decides what is done, the caller replans."""

    def run(self, out_url: str, chunks: Sequence[int]) -> Iterator[Receipt]:
        """Run the chunks. Closing the iterator early lets the chunks in flight finish, and starts no more."""

    def describe(self) -> str:
        """Where the work runs, in a few words."""

    def live_actors(self) -> int:
        """How many models are loaded and at work."""

    def close(self) -> None:
        """Give everything back."""
