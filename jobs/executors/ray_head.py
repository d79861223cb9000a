"""Whether the head of another cluster answers: after a minute of silence Ray ends this process without a word."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from latentmill.jobs.terminal import print_line

_ASK_SECONDS = 5.0
_ANSWER_SECONDS = 2.0


@contextmanager
def watched_head(address: str | None) -> Iterator[None]:
    """Within, a head at HOST:PORT that falls silent is told, once for each silence. Without an address nothing is."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, over), name="head", daemon=True)
    if address is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if address is not None:
            thread.join(_ANSWER_SECONDS)


def _watch(address: str, over: threading.Event) -> None:
    told = False
    while not over.wait(_ASK_SECONDS):
        silent = not _answers(address)
        if silent and not told:
            text = f"the head of the Ray cluster at {address} does not answer; if it stays away for a minute this "
            print_line(f"latentmill: {text}command ends: run it again then, it resumes", error=True)
        told = silent


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
