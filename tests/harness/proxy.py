"""A proxy in front of a real store that does to requests what networks, busy servers and tests do (faults.py).

The client's Host header goes on as it came, so signatures hold. It runs in a thread of the test, whose rule may be
changed at any time, or as a process of its own, whose faults follow from a seed: `python -m tests.harness.proxy`
prints its address, and `GET /.proxy/report` answers what it has done so far.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.harness.faults import Faults, Rule, never

REPORT = "/.proxy/report"
_RESET = struct.pack("ii", 1, 0)  # linger for zero seconds: close() sends RST
_ATTEMPT = re.compile(r"^/(.+)/images/\d{5}/(\d{8})-([0-9a-f]{16})/")


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    head: bytes
    body: bytes


class Proxy:
    """Forwards to `upstream`; `rule` says what befalls whom, and `made` has what was done to whom."""

    def __init__(self, upstream: str, rule: Rule = never) -> None:
        self.url = ""
        self.rule = rule
        self.made: list[tuple[str, str, str]] = []
        self.victim: int | None = None
        """The process that `kill` means."""
        self.killed: int | None = None
        address = urlsplit(upstream)
        self._upstream = (address.hostname, address.port)
        self._requests: Counter[str] = Counter()
        self._attempts: dict[str, set[str]] = {}

    def report(self) -> dict[str, object]:
        """Requests by method, faults by kind, and how many attempts at chunks began to upload, by output."""
        faults = Counter("refuse" if kind[0].isdecimal() else kind.split()[0] for kind, _, _ in self.made)
        attempts = {out: len(found) for out, found in self._attempts.items()}
        return {"requests": dict(self._requests), "faults": dict(faults), "attempts": attempts}

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
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # the client has gone, the store has, or the proxy ends: the client sees a closed connection
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can go on afterwards."""
        self._requests[request.method] += 1
        kind = self.rule(request.method, request.target)
        if kind is not None:
            self.made.append((kind, request.method, request.target))
        word, _, argument = (kind or "").partition(" ")
        if word.isdecimal():
            writer.write(_error(request.method, word, argument))
            return True
        if word == "stall":
            await asyncio.sleep(60)
        if word in {"stall", "reset"}:
            _reset(writer)
            return False
        if word == "delay":
            await asyncio.sleep(float(argument))
        if word == "plain":
            request = _without_condition(request)
        if word == "kill":
            await self._kill_within(request, argument)
            return False
        return await self._answer_after_the_store(word, argument, request, writer)

    async def _answer_after_the_store(
        self, word: str, argument: str, request: Request, writer: asyncio.StreamWriter
    ) -> bool:
        answer = await self._forward(request)
        if word == "twice":
            second = await self._forward(request)
            answer = answer if argument == "1" else second
        if word == "drop":
            _reset(writer)
            return False
        if word == "truncate":
            head, _, body = answer.partition(b"\r\n\r\n")
            answer = head + b"\r\n\r\n" + body[: len(body) // 2]
        writer.write(_error(request.method, *argument.split(" ", 1)) if word == "deny" else answer)
        await writer.drain()
        return word != "truncate"

    async def _kill_within(self, request: Request, when: str) -> None:
        assert self.victim is not None, "the proxy does not know whom to kill"
        if when == "half":
            _, writer = await asyncio.open_connection(*self._upstream)
            writer.write(request.head + request.body[: len(request.body) // 2])
            await writer.drain()
        else:
            await self._forward(request)
        self.killed = self.victim
        os.kill(self.victim, signal.SIGKILL)
        if when == "half":
            writer.close()

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

    async def listen(self) -> asyncio.Server:
        """Take connections on a free port; afterwards `url` is known."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server


@contextlib.contextmanager
def fault_proxy(upstream: str, rule: Rule = never) -> Iterator[Proxy]:
    """A proxy in a thread of this process, for as long as the context lasts."""
    proxy = Proxy(upstream, rule)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(proxy.listen())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def fault_proxy_process(upstream: str, faults: Faults, seed: int) -> Iterator[str]:
    """The address of a proxy in a process of its own, which ends with the context."""
    command = [sys.executable, "-m", "tests.harness.proxy", "--upstream", upstream]
    command += ["--seed", str(seed), "--faults", json.dumps(asdict(faults))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def proxy_report(address: str) -> dict[str, Any]:
    """What `Proxy.report` says in that process."""
    with urllib.request.urlopen(address + REPORT, timeout=10) as answer:
        report: dict[str, Any] = json.load(answer)
    return report


async def _end(server: asyncio.Server) -> None:
    """Nobody is served any more, neither who stalls nor who has just come."""
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


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


def _without_condition(request: Request) -> Request:
    """The same request without its create-only header, signed anew with this process's keys."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    headers = dict(line.decode("latin-1").split(": ", 1) for line in request.head[:-4].split(b"\r\n")[1:])
    if "if-none-match" not in {name.lower() for name in headers}:
        return request
    host = next(value for name, value in headers.items() if name.lower() == "host")
    anew = AWSRequest(request.method, f"http://{host}{request.target}", data=request.body)
    keys = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    S3SigV4Auth(keys, "s3", "us-east-1").add_auth(anew)
    lines = [f"{request.method} {request.target} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(request.body)}"]
    lines += [f"{name}: {value}" for name, value in anew.headers.items()] + ["Connection: close"]
    return Request(request.method, request.target, "\r\n".join([*lines, "\r\n"]).encode("latin-1"), request.body)


def _error(method: str, status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>fault proxy</Message></Error>".encode()
    head = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def _main(arguments: argparse.Namespace) -> None:
    proxy = Proxy(arguments.upstream, Faults(**json.loads(arguments.faults)).rule(arguments.seed))
    server = await proxy.listen()
    print(proxy.url, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="{}", help="JSON: shares that differ from the defaults")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args()))
    sys.exit(0)
