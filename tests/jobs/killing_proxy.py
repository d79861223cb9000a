"""A proxy before an S3 server that kills its client with half of a body sent, or with the answer not yet received."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class AtRequest:
    """The nth PUT of a path that contains `part`: `half` of its body sent, or `unanswered`, with the answer held."""

    when: Literal["half", "unanswered"]
    part: str
    nth: int = 1


class KillingProxy:
    """Hands bytes on in both directions. At the chosen request it kills `victim`, once, and drops the connection."""

    def __init__(self, server: str, trap: AtRequest) -> None:
        at = urlsplit(server)
        self._server = (str(at.hostname), int(at.port or 80))
        self._trap = trap
        self._requests = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.victim: int | None = None
        self.killed: int | None = None

    def serve(self) -> None:
        """Take connections until the proxy is closed."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hand_on, args=(client,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _hand_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            connection = _Connection(client, server)
            up = threading.Thread(target=self._hand_up, args=(connection,), daemon=True)
            up.start()
            self._hand_down(connection)
            up.join()

    def _hand_up(self, connection: _Connection) -> None:
        """Requests, one after another: a head, then as many bytes as it says."""
        data = b""
        with connection.ending(), contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in data:
                    more = connection.client.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = int((re.search(rb"(?i)\r\ncontent-length: *(\d+)", head) or [b"", b"0"])[1])
                chosen = self._is_chosen(head)
                if chosen and self._trap.when == "unanswered":
                    connection.withheld = True
                connection.server.sendall(head + b"\r\n\r\n")
                stop = length // 2 if chosen and self._trap.when == "half" else length
                sent = 0
                while sent < stop:
                    data = data or connection.client.recv(65536)
                    if not data:
                        return
                    piece, data = data[: stop - sent], data[stop - sent :]
                    connection.server.sendall(piece)
                    sent += len(piece)
                if stop < length:
                    self._kill()
                    return

    def _hand_down(self, connection: _Connection) -> None:
        with connection.ending(), contextlib.suppress(OSError):
            while data := connection.server.recv(65536):
                if connection.withheld and not data.startswith(b"HTTP/1.1 100"):
                    self._kill()
                    return
                connection.client.sendall(data)

    def _is_chosen(self, head: bytes) -> bool:
        method, path = head.split(b" ", 2)[:2]
        if method != b"PUT" or self._trap.part.encode() not in path:
            return False
        with self._lock:
            self._requests += 1
            return self._requests == self._trap.nth

    def _kill(self) -> None:
        assert self.victim is not None
        self.killed = self.victim
        os.kill(self.victim, signal.SIGKILL)


@dataclass
class _Connection:
    client: socket.socket
    server: socket.socket
    withheld: bool = False

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Whoever ends first ends both sides."""
        try:
            yield
        finally:
            for side in (self.client, self.server):
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def killing_proxy(server: str, trap: AtRequest) -> Iterator[KillingProxy]:
    """A proxy that runs while the context lasts."""
    proxy = KillingProxy(server, trap)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
