"""Ports for servers of tests."""

from __future__ import annotations

import contextlib
import secrets
import socket

_FIRST, _LAST = 20_000, 30_000


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to clients: a server can come back to its own.

    They are drawn at random, so that test processes side by side do not choose the same ones.
    """
    found: set[int] = set()
    while len(found) < number:
        port = _FIRST + secrets.randbelow(_LAST - _FIRST)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)
