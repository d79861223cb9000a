"""The proxy does what it says, no more and no less, and the storage layer lives through it."""

from __future__ import annotations

import hashlib
import http.client
import signal
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

from latentmill.jobs.store.storage import Storage
from tests.harness.faults import AtRequest, Faults, always, once
from tests.harness.proxy import fault_proxy, fault_proxy_process, proxy_report

pytestmark = pytest.mark.long

NONE = Faults(**dict.fromkeys((field.name for field in fields(Faults)), 0.0))
BODY = b"0123456789" * 100


class Upstream(BaseHTTPRequestHandler):
    """Answers with 1000 bytes and remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, str, bytes]]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.path, self.headers["Host"], body))
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BODY)

    do_PUT = do_HEAD = do_GET  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def upstream() -> Iterator[tuple[str, list[tuple[str, str, str, bytes]]]]:
    seen: list[tuple[str, str, str, bytes]] = []
    handler = type("Handler", (Upstream,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=socketserver.BaseServer.serve_forever, args=(server, 0.05))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()


def ask(address: str, method: str, body: bytes = b"") -> http.client.HTTPResponse | str:
    """The answer, read whole, or the name of the exception."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    try:
        connection.request(method, "/a/path?x=1", body=body, headers={"Host": "the.client.says"})
        answer = connection.getresponse()
        answer.content = answer.read()  # type: ignore[attr-defined]
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    else:
        return answer
    finally:
        connection.close()


def test_without_faults_everything_goes_on_as_it_came():
    with upstream() as (url, seen), fault_proxy_process(url, NONE, 0) as proxy:
        assert ask(proxy, "GET").content == BODY
        assert ask(proxy, "PUT", b"some bytes").status == 200
        assert ask(proxy, "HEAD").content == b""
        assert seen == [
            ("GET", "/a/path?x=1", "the.client.says", b""),
            ("PUT", "/a/path?x=1", "the.client.says", b"some bytes"),
            ("HEAD", "/a/path?x=1", "the.client.says", b""),
        ]
        assert proxy_report(proxy) == {"requests": {"GET": 1, "PUT": 1, "HEAD": 1}, "faults": {}, "attempts": {}}


CUT = {"ConnectionResetError", "RemoteDisconnected"}


@pytest.mark.parametrize(
    ("fault", "method", "forwarded", "outcome"),
    [
        ("refuse", "PUT", 0, {500, 503}),
        ("deny", "PUT", 1, {500, 503}),
        ("drop", "PUT", 1, CUT),
        ("reset", "GET", 0, CUT),
        ("truncate", "GET", 1, {"IncompleteRead"}),
        ("twice", "PUT", 2, {200}),
        ("delay", "GET", 1, {200}),
        ("truncate", "PUT", 1, {200}),  # only bodies of GETs are cut, and only PUTs come twice
        ("twice", "GET", 1, {200}),
    ],
)
def test_each_fault_of_the_weather(fault: str, method: str, forwarded: int, outcome: set[int | str]):
    weather = Faults(**{**vars(NONE), fault: 1.0}).rule(0)
    with upstream() as (url, seen), fault_proxy(url, weather) as proxy:
        answer = ask(proxy.url, method)
        assert (answer if isinstance(answer, str) else answer.status) in outcome
        assert len(seen) == forwarded
        applies = {"truncate": "GET", "twice": "PUT"}.get(fault, method) == method
        assert proxy.report()["faults"] == ({fault: 1} if applies else {})


def test_a_rule_chooses_whom_it_befalls_and_may_be_changed():
    with upstream() as (url, seen), fault_proxy(url, once("404 NoSuchKey", method="GET", after=1)) as proxy:
        assert [ask(proxy.url, method).status for method in ("GET", "PUT", "GET", "GET")] == [200, 200, 404, 200]
        assert proxy.made == [("404 NoSuchKey", "GET", "/a/path?x=1")]
        proxy.rule = always("reset", target="a/path")
        assert {ask(proxy.url, method) for method in ("GET", "PUT")} <= CUT
        assert len(seen) == 3


def test_who_is_stalled_waits_until_the_proxy_ends():
    with upstream() as (url, seen), ThreadPoolExecutor(1) as pool:
        with fault_proxy(url, always("stall")) as proxy:
            asked = pool.submit(ask, proxy.url, "GET")
            with pytest.raises(TimeoutError):
                asked.result(0.3)
        assert asked.result(10) in CUT
        assert seen == []


@pytest.mark.parametrize(("when", "reached"), [("half", b"123"), ("unanswered", b"123456")])
def test_a_client_is_killed_in_the_middle_of_its_request(when: Literal["half", "unanswered"], reached: bytes):
    """The store has half of its body and no more, or the whole; the client never has an answer."""
    trap = AtRequest(when, "a/path", 2)
    with socket.create_server(("127.0.0.1", 0)) as store, subprocess.Popen(["sleep", "60"]) as victim:
        got: list[bytes] = []
        thread = threading.Thread(target=take, args=(store, got, b"123456"))
        thread.start()
        with fault_proxy(f"http://127.0.0.1:{store.getsockname()[1]}", trap.rule) as proxy:
            proxy.victim = victim.pid
            assert ask(proxy.url, "PUT", b"first").status == 200
            assert victim.poll() is None
            assert ask(proxy.url, "PUT", b"123456") in CUT
            assert victim.wait(10) == -signal.SIGKILL
            assert proxy.killed == victim.pid
        thread.join(10)
    assert got == [b"first", reached]


def take(store: socket.socket, got: list[bytes], last: bytes) -> None:
    """A store that takes two requests, each until it is whole or its connection ends."""
    for _ in range(2):
        connection = store.accept()[0]
        with connection:
            data = b""
            while not data.endswith((b"\r\n\r\nfirst", last)) and (more := connection.recv(1000)):
                data += more
            got.append(data.partition(b"\r\n\r\n")[2])
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def test_the_same_seed_makes_the_same_faults():
    draws = []
    for seed in (1, 1, 2):
        rule = Faults().rule(seed)
        draws.append([rule("PUT", "/x") for _ in range(60)])
    assert draws[0] == draws[1] != draws[2]


def test_storage_lives_through_it(s3_endpoint: str, s3: str, monkeypatch: pytest.MonkeyPatch):
    """20 % errors, 5 % lost answers, 3 % cut bodies: what is read is what was written, a create has one winner."""
    import s3fs

    with fault_proxy_process(s3_endpoint, Faults(delay=0.0), 7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            storage = Storage.open(s3)

            def round_trip(number: int) -> None:
                data = hashlib.sha256(b"%d" % number).digest() * 400
                path = f"images/00000/{number:08d}-{number:016x}/x.png"
                storage.write(path, data)
                storage.create(f"ledger/{number}", data)
                assert not storage.create(f"ledger/{number}", b"another")
                assert storage.read(path) == data == storage.read(f"ledger/{number}")

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(round_trip, range(30)))
            assert len(list(storage.list("ledger"))) == 30
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
        report = proxy_report(proxy)
    assert sum(report["requests"].values()) > 150
    assert set(report["faults"]) >= {"refuse", "deny", "drop", "reset", "truncate", "twice"}
    assert report["attempts"] == {s3.removeprefix("s3://"): 30}
