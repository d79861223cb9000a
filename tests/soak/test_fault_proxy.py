"""The proxy does what it says, no more and no less, and the storage layer lives through it."""

from __future__ import annotations

import hashlib
import http.client
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from latentmill.jobs.store.storage import Storage
from tests.soak.fault_proxy import Faults
from tests.soak.fault_proxy_process import fault_proxy, proxy_report

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
    with upstream() as (url, seen), fault_proxy(url, NONE, 0) as proxy:
        assert ask(proxy, "GET").content == BODY
        assert ask(proxy, "PUT", b"some bytes").status == 200
        assert ask(proxy, "HEAD").content == b""
        assert seen == [
            ("GET", "/a/path?x=1", "the.client.says", b""),
            ("PUT", "/a/path?x=1", "the.client.says", b"some bytes"),
            ("HEAD", "/a/path?x=1", "the.client.says", b""),
        ]
        assert proxy_report(proxy) == {"requests": {"GET": 1, "PUT": 1, "HEAD": 1}, "faults": {}, "attempts": {}}


@pytest.mark.parametrize(
    ("fault", "method", "forwarded", "outcome"),
    [
        ("refuse", "PUT", 0, {500, 503}),
        ("deny", "PUT", 1, {500, 503}),
        ("drop", "PUT", 1, {"ConnectionResetError", "RemoteDisconnected"}),
        ("reset", "GET", 0, {"ConnectionResetError", "RemoteDisconnected"}),
        ("truncate", "GET", 1, {"IncompleteRead"}),
        ("duplicate", "PUT", 2, {200}),
        ("stall", "GET", 1, {200}),
        ("truncate", "PUT", 1, {200}),  # only bodies of GETs are cut, and only PUTs come twice
        ("duplicate", "GET", 1, {200}),
    ],
)
def test_each_fault(fault: str, method: str, forwarded: int, outcome: set[int | str]):
    with upstream() as (url, seen), fault_proxy(url, Faults(**{**vars(NONE), fault: 1.0}), 0) as proxy:
        answer = ask(proxy, method)
        assert (answer if isinstance(answer, str) else answer.status) in outcome
        assert len(seen) == forwarded
        made = proxy_report(proxy)["faults"]
        applies = {"truncate": "GET", "duplicate": "PUT"}.get(fault, method) == method
        assert made == ({fault: 1} if applies else {})


def test_the_same_seed_makes_the_same_faults():
    with upstream() as (url, _):
        outcomes = []
        for seed in (1, 1, 2):
            with fault_proxy(url, Faults(stall=0.0), seed) as proxy:
                answers = [ask(proxy, "PUT") for _ in range(60)]
                outcomes.append([answer if isinstance(answer, str) else answer.status for answer in answers])
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_storage_lives_through_it(s3_endpoint: str, s3: str, monkeypatch: pytest.MonkeyPatch):
    """20 % errors, 5 % lost answers, 3 % cut bodies: what is read is what was written, a create has one winner."""
    import s3fs

    with fault_proxy(s3_endpoint, Faults(stall=0.0), 7) as proxy:
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
    assert set(report["faults"]) >= {"refuse", "deny", "drop", "reset", "truncate", "duplicate"}
    assert report["attempts"] == {s3.removeprefix("s3://"): 30}
