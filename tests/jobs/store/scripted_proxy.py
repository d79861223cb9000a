"""A proxy in front of a real S3 server that does to a request exactly what a test says, once or always."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_RESET = struct.pack("ii", 1, 0)  # linger for zero seconds: close() sends RST
Rule = Callable[[str, str], str | None]
"""From a request's method and target to what becomes of it; None for nothing.

`drop`: the store does it, and the connection is reset instead of an answer. `reset`: the store never hears of it.
`stall`: nothing is ever answered. `truncate`: half of the body arrives. `twice`: the store gets it twice, and the
second answer comes back. `plain`: the create-only header is taken out. `503 SlowDown` and the like: that answer.
"""


@dataclass
class Proxy:
    """`rule` may be changed at any time; `made` has what was done to whom."""

    url: str = ""
    rule: Rule = lambda _method, _target: None
    made: list[tuple[str, str, str]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


def once(kind: str, *, method: str, target: str = "", after: int = 0) -> Rule:
    """Do it to the first such request after so many; `target` is a part of its path and query."""
    seen = iter(range(10**9))

    def rule(its_method: str, its_target: str) -> str | None:
        return kind if its_method == method and target in its_target and next(seen) == after else None

    return rule


def always(kind: str, *, method: str = "", target: str = "") -> Rule:
    """Do it to every such request."""
    return lambda its_method, its_target: kind if method in its_method and target in its_target else None


@contextlib.contextmanager
def scripted_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy on a free port, for as long as the context lasts."""
    proxy = Proxy()

    class Handler(_Handler):
        state, store = proxy, urlsplit(upstream).netloc

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Proxy
    store: str

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):  # the client has hung up
            super().handle_one_request()
            return
        self.close_connection = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.state.rule(self.command, self.path)
        if kind is not None:
            self.state.made.append((kind, self.command, self.path))
        if kind == "stall":
            self.state.closing.wait(60)
        if kind in {"stall", "reset"}:
            return self._hang_up()
        if kind is not None and kind[0].isdecimal():
            status, _, code = kind.partition(" ")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>played</Message></Error>".encode()
            return self._reply(int(status), [("Content-Type", "application/xml")], text)
        for _ in range(2 if kind == "twice" else 1):
            status, headers, answer = self._forward(body, plain=kind == "plain")
        if kind == "drop":
            return self._hang_up()
        return self._reply(status, headers, answer, cut=kind == "truncate")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815 - http.server asks for these names

    def _forward(self, body: bytes, *, plain: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if plain and "if-none-match" in self.headers:
            headers = self._signed_anew(body)
        connection = http.client.HTTPConnection(self.store, timeout=30)
        try:
            connection.request(self.command, self.path, body=body or None, headers=headers)
            answer = connection.getresponse()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in {"connection", "transfer-encoding", "content-length", "date", "server"}
            ]
            length = answer.getheader("Content-Length")
            if self.command == "HEAD" and length is not None:
                kept.append(("Content-Length", length))
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def _signed_anew(self, body: bytes) -> dict[str, str]:
        """The same request without its create-only header, which the signature covers."""
        request = AWSRequest(self.command, f"http://{self.store}{self.path}", data=body)
        keys = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def _hang_up(self) -> None:
        time.sleep(0.01)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close_connection = True
