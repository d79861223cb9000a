"""A seeded HTTP proxy that does to a store's clients what networks and busy servers do: errors, losses, stalls.

The client's Host header goes on as it came, so signatures hold. One fault at most befalls a request. Run it as a
process of its own, `python -m tests.soak.fault_proxy --upstream http://HOST:PORT`; it prints its address, and
`GET /.proxy/report` answers what it has done so far. Its choices follow from the seed and the order of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import sys
from collections import Counter
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

REPORT = "/.proxy/report"
_RESET = struct.pack("ii", 1, 0)  # linger for zero seconds: close() sends RST
_ATTEMPT = re.compile(r"^/(.+)/images/\d{5}/(\d{8})-([0-9a-f]{16})/")
_ERRORS = ((500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable"))


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How often each fault happens, as a share of all requests (`truncate`: of GETs, `duplicate`: of PUTs)."""

    refuse: float = 0.10
    """A 5xx answer, and the store never heard of the request."""
    deny: float = 0.10
    """A 5xx answer, although the store has done what it was asked."""
    drop: float = 0.05
    """The store has done it, and the connection is reset instead of an answer."""
    reset: float = 0.02
    """The connection is reset before the store hears of it."""
    stall: float = 0.01
    """The request waits for `stall_seconds` first."""
    stall_seconds: float = 3.0
    freeze: float = 0.0
    """It waits for 60 s, at which clients give up."""
    truncate: float = 0.03
    """The body of the answer ends half-way."""
    duplicate: float = 0.03
    """The network delivers the request twice, and either answer comes back."""


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    head: bytes
    body: bytes


class FaultProxy:
    """Forwards to `upstream`, with faults; one per `python -m` process."""

    def __init__(self, upstream: str, faults: Faults, seed: int) -> None:
        address = urlsplit(upstream)
        self._upstream = (address.hostname, address.port)
        self._faults = faults
        self._random = random.Random(seed)
        self._made: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._attempts: dict[str, set[str]] = {}

    def report(self) -> dict[str, object]:
        """Requests by method, faults by kind, and how many attempts at chunks began to upload, by output."""
        attempts = {out: len(found) for out, found in self._attempts.items()}
        return {"requests": dict(self._requests), "faults": dict(self._made), "attempts": attempts}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, until either side ends it."""
        try:
            while (request := await _read_request(reader, writer)) is not None:
                if request.target == REPORT:
                    answer = json.dumps(self.report()).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
                elif not await self._answer(request, writer):
                    return
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client has gone, or the store has: the client sees a closed connection
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can go on afterwards."""
        fault = self._choose(request.method)
        self._requests[request.method] += 1
        if fault == "refuse":
            writer.write(self._error(request.method))
        elif fault == "reset":
            _reset(writer)
        elif fault in {"stall", "freeze"}:
            await asyncio.sleep(60.0 if fault == "freeze" else self._random.uniform(0.5, self._faults.stall_seconds))
            writer.write(await self._forward(request))
        else:
            return await self._answer_after_the_store(fault, request, writer)
        return fault != "reset"

    async def _answer_after_the_store(self, fault: str | None, request: Request, writer: asyncio.StreamWriter) -> bool:
        answer = await self._forward(request)
        if fault == "deny":
            writer.write(self._error(request.method))
        elif fault == "drop":
            _reset(writer)
            return False
        elif fault == "truncate":
            head, _, body = answer.partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n" + body[: len(body) // 2])
            await writer.drain()
            return False
        elif fault == "duplicate":
            writer.write(self._random.choice([answer, await self._forward(request)]))
        else:
            writer.write(answer)
        return True

    def _choose(self, method: str) -> str | None:
        draw = self._random.random()
        for field in fields(self._faults):
            kind = field.name
            if kind == "stall_seconds" or kind == {"GET": "duplicate", "PUT": "truncate"}.get(method):
                continue
            if kind in {"duplicate", "truncate"} and method not in {"GET", "PUT"}:
                continue
            draw -= getattr(self._faults, kind)
            if draw < 0:
                self._made[kind] += 1
                return kind
        return None

    def _error(self, method: str) -> bytes:
        status, code = self._random.choice(_ERRORS)
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>fault proxy</Message></Error>".encode()
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + (b"" if method == "HEAD" else body)

    async def _forward(self, request: Request) -> bytes:
        """The store's whole answer, on a connection of its own."""
        if request.method == "PUT" and (place := _ATTEMPT.match(request.target)):
            self._attempts.setdefault(place[1], set()).add(f"{place[2]}-{place[3]}")
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request.head + request.body)
            answer = await reader.read()
        finally:
            writer.close()
        head, separator, body = answer.partition(b"\r\n\r\n")
        if not separator:
            raise ConnectionResetError("the store sent no answer")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        names = {line.split(b":")[0].lower() for line in lines[1:]}
        if request.method != "HEAD" and not names & {b"content-length", b"transfer-encoding"}:
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request, None at the end of the connection. Its head asks the store to close afterwards."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head[:-4].split(b"\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if b"expect" in headers:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = await _read_chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
    kept = [line for line in lines if not line.lower().startswith((b"connection:", b"expect:"))]
    method, target, _ = first.decode("latin-1").split(" ", 2)
    return Request(
        method=method, target=target, head=b"\r\n".join([first, *kept, b"Connection: close"]) + b"\r\n\r\n", body=body
    )


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body as it came, frames and trailers included."""
    parts = []
    while True:
        line = await reader.readuntil(b"\r\n")
        parts.append(line)
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        parts.append(await reader.readexactly(size + 2))
    while parts[-1] != b"\r\n":
        parts.append(await reader.readuntil(b"\r\n"))
    return b"".join(parts)


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def _main(arguments: argparse.Namespace) -> None:
    faults = Faults(**json.loads(arguments.faults))
    proxy = FaultProxy(arguments.upstream, faults, arguments.seed)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="{}", help="JSON: shares that differ from the defaults")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args()))
    sys.exit(0)
