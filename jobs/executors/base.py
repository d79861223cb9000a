"""What every executor does: run chunks through `worker.py`, in any order, and hand back one receipt for each try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from latentmill.jobs.worker import Receipt


class Executor(Protocol):
    """Somewhere to run chunks. It may drop or repeat chunks: the ledger decides what is done, the caller replans."""

    def run(self, out_url: str, chunks: Sequence[int], *, repair: bool = False) -> Iterator[Receipt]:
        """Run the chunks; a `repair` makes the failed rows of committed chunks again.

        A chunk that breaks its worker is isolated: sooner or later it is committed, with only the culprits failed.
        Closing the iterator early starts no more chunks; whether those in flight are finished is the executor's matter.
        """

    def stop(self) -> bool:
        """Start no more chunks; `run` then ends once those in flight are done. False if there is none in flight.

        It may be called from a signal's handler.
        """

    def describe(self) -> str:
        """Where the work runs, in a few words."""

    def live_actors(self) -> int:
        """How many models are loaded and at work."""

    def left_out(self) -> Sequence[str]:
        """What could not take part, and why: one line for each such node."""

    def close(self) -> None:
        """Give everything back."""
