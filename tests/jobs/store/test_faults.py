"""A real S3 server whose answers are late, lost, doubled, cut short or refused: what each does to a job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import s3fs

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.ledger.ledger import Ledger, record_path
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.store import clients
from latentmill.jobs.store import storage as storage_module
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import SINGLE_WRITER_PATH, Storage
from tests.harness.faults import always, once
from tests.harness.proxy import Proxy, fault_proxy
from tests.jobs.driver import job_spec, pictures, read_dataset, run, start
from tests.jobs.fakes import slow_engine

pytestmark = pytest.mark.long

Manifest = Callable[..., Path]
PROMPTS = ["one", "two", "some nsfw", "four", "five"]


@pytest.fixture
def proxy(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_sleep", lambda _: None)


@pytest.fixture
def undisturbed(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> Callable[[], object]:
    def dataset() -> object:
        run(job_spec(tiny_model, manifest(PROMPTS), tmp_path / "undisturbed"))
        return read_dataset(str(tmp_path / "undisturbed"))

    return dataset


CALLS: dict[str, tuple[str, Callable[[Storage], object], object]] = {
    "read": ("GET", lambda store: store.read("there"), b"x" * 5000),
    "write": ("PUT", lambda store: store.write("new", b"y" * 5000), None),
    "create": ("PUT", lambda store: store.create("new", b"y" * 5000), True),
    "size": ("HEAD", lambda store: store.size("there"), 5000),
    "list": ("GET", lambda store: list(store.list("")), [("there", 5000)]),
    "delete": ("DELETE", lambda store: store.delete("there"), None),
}
PASSING = ["500 InternalError", "502 Odd", "503 SlowDown", "503 ServiceUnavailable", "409 OperationAborted", "reset"]


@pytest.mark.usefixtures("_without_pauses")
@pytest.mark.parametrize("kind", [*PASSING, "drop", "truncate"])
@pytest.mark.parametrize("verb", CALLS)
def test_a_fault_that_passes_is_not_seen(verb: str, kind: str, s3: str, proxy: Proxy) -> None:
    method, call, answer = CALLS[verb]
    store = Storage.open(s3)
    store.write("there", b"x" * 5000)
    proxy.rule = once(kind, method=method)
    assert call(store) == (False if (verb, kind) == ("create", "drop") else answer)  # the ledger reads back
    assert proxy.made
    assert verb not in {"write", "create"} or store.read("new") == b"y" * 5000


def test_an_answer_twice_is_harmless(s3: str, proxy: Proxy) -> None:
    proxy.rule = always("twice", method="PUT")
    store = Storage.open(s3)
    assert store.create("x", b"1") is False  # the second refusal is what arrives: whoever must know, reads
    assert store.read("x") == b"1"
    store.write("x", b"2")
    assert store.read("x") == b"2"
    assert store.probe() is store


@pytest.mark.parametrize("kind", ["drop", "twice", "412 PreconditionFailed"])
def test_a_commit_whose_answer_is_lost_stands(
    kind: str, s3: str, proxy: Proxy, manifest: Manifest, tiny_model: Path, undisturbed: Callable[[], object]
) -> None:
    if kind[
        0
    ].isdecimal():  # the store has it, and then says that it was there before: what a retry inside a client makes
        proxy.rule = _then(once("drop", method="PUT", target="/ledger/"), kind)
    else:
        proxy.rule = (
            always(kind, method="PUT", target="/ledger/")
            if kind == "twice"
            else once(kind, method="PUT", target="/ledger/")
        )
    summary = run(job_spec(tiny_model, manifest(PROMPTS), s3))
    assert proxy.made
    assert (summary.exit_code, summary.generated) == (0, len(PROMPTS))
    assert verify(s3).defects == ()
    assert len({path.rpartition("/")[0] for path, _ in pictures(Storage.open(s3))}) == 3, "an attempt was made twice"
    assert read_dataset(s3) == undisturbed()


def _then(first: Callable[[str, str], str | None], kind: str) -> Callable[[str, str], str | None]:
    lost: list[str] = []

    def rule(method: str, target: str) -> str | None:
        if method == "PUT" and target in lost:
            lost.remove(target)
            return kind
        fault = first(method, target)
        if fault:
            lost.append(target)
        return fault

    return rule


def test_a_store_that_stalls_for_a_moment_is_waited_for(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ANSWER_SECONDS", 1)
    store = Storage.open(s3)
    store.write("x", b"1")
    proxy.rule = once("stall", method="GET")
    started = time.monotonic()
    assert store.read("x") == b"1"
    assert 0.9 < time.monotonic() - started < 15


def test_a_store_that_stalls_for_good_is_told_and_ends_in_time(
    s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clients, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 4.0)
    monkeypatch.setattr(storage_module, "_SILENCE_SECONDS", 1.5)
    store = Storage.open(s3)
    proxy.rule = always("stall")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="check the network") as caught:
        store.write("images/x", b"1")
    assert time.monotonic() - started < 30
    assert caught.value.transient
    assert "\n" not in str(caught.value)
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == ["cannot write images/x"]


def test_the_clients_own_retries_do_not_multiply(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "TRIES", 3)
    monkeypatch.setattr(storage_module, "_sleep", lambda _: None)
    store = Storage.open(s3)
    for kind in ("reset", "503 SlowDown", "500 InternalError"):
        proxy.rule, proxy.made = always(kind), []
        with pytest.raises(StorageError):
            store.read("x")
        assert len(proxy.made) == (6 if kind == "reset" else 3), kind  # aiohttp itself repeats a GET, once


def test_a_users_own_client_settings_stand_above_ours(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 77, "retries": {"max_attempts": 9}}}
    )
    settings = Storage.open(s3)._backend._fs._prepare_config_kwargs()
    assert (settings["read_timeout"], settings["connect_timeout"]) == (77, clients.CONNECT_SECONDS)
    assert settings["retries"] == {"max_attempts": 9}
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    assert "retries" not in Storage.open(s3)._backend._fs._prepare_config_kwargs()


@pytest.mark.usefixtures("_without_pauses")
def test_the_bar_a_quarter_of_all_answers_faulty(
    s3: str, proxy: Proxy, manifest: Manifest, tiny_model: Path, undisturbed: Callable[[], object]
) -> None:
    import random

    chance = random.Random(4)

    def weather(method: str, _: str) -> str | None:
        draw = chance.random()
        if draw < 0.20:
            return chance.choice(["500 InternalError", "503 SlowDown"])
        if draw < 0.25:
            return chance.choice(["drop", "reset"])
        return "truncate" if draw < 0.26 and method == "GET" else None

    proxy.rule = weather
    summary = run(job_spec(tiny_model, manifest(PROMPTS), s3))
    assert len(proxy.made) > 10
    assert (summary.exit_code, summary.generated) == (0, len(PROMPTS))
    proxy.rule = always("", method="nothing")
    assert verify(s3).defects == ()
    assert read_dataset(s3) == undisturbed()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("403 ExpiredToken", "ExpiredToken.*check the credentials"),
        ("404 NoSuchBucket", "NoSuchBucket.*create the bucket"),
        ("507 InsufficientStorage", "free some space"),
        ("403 RequestTimeTooSkewed", "set this machine's clock"),
    ],
)
def test_what_will_not_pass_is_said_at_once(kind: str, words: str, s3: str, proxy: Proxy) -> None:
    store = Storage.open(s3)
    proxy.rule = always(kind)
    for call in (lambda: store.write("x", b"1"), lambda: store.create("x", b"1"), lambda: store.read("x")):
        proxy.made = []
        with pytest.raises(StorageError, match=words) as caught:
            call()
        assert not caught.value.transient
        assert len(proxy.made) == 1
    with pytest.raises(UsageError, match=words):
        store.probe()


def test_a_damaged_answer_does_not_reach_the_terminal(s3: str, proxy: Proxy) -> None:
    proxy.rule = always("400 \x1b[2JBell\x07")
    with pytest.raises(StorageError) as caught:
        Storage.open(s3).write("x", b"1")
    assert str(caught.value).isprintable()


def test_one_writer_on_a_store_without_create_only_writes(
    s3: str,
    proxy: Proxy,
    manifest: Manifest,
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
    undisturbed: Callable[[], object],
    tmp_path: Path,
) -> None:
    proxy.rule = always("plain", method="PUT")
    with pytest.raises(UsageError, match=r"ignores create-only writes \(If-None-Match\).*--single-writer"):
        run(job_spec(tiny_model, manifest(PROMPTS), s3))
    assert list(Storage.open(s3).list("")) == []
    spec = job_spec(tiny_model, manifest(PROMPTS), s3, single_writer=True)
    driver = start(spec, tmp_path / "log", engine=slow_engine)
    driver.join(60)
    assert driver.exitcode == 0, (tmp_path / "log").read_text()
    assert any(kind == "plain" for kind, _, _ in proxy.made), "the proxy never saw the header"
    assert Storage.open(s3).exists(SINGLE_WRITER_PATH)
    assert run(spec).generated == 0
    assert ["two drivers at once would not be safe there" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(UsageError, match="--single-writer"):
        run(job_spec(tiny_model, manifest(PROMPTS), s3))
    assert verify(s3).defects == ()
    assert read_dataset(s3) == undisturbed()


def test_workers_of_a_single_writer_look_before_they_write(s3: str, proxy: Proxy) -> None:
    proxy.rule = always("plain", method="PUT")
    storage = Storage.open(s3).probe(allow_single_writer=True)
    storage.mark_single_writer()
    worker = Storage.of_output(s3)
    assert worker.create("ledger/x", b"1")
    assert not worker.create("ledger/x", b"2")
    assert worker.read("ledger/x") == b"1"


def test_the_flag_changes_nothing_on_a_store_with_create_only_writes(s3: str) -> None:
    storage = Storage.open(s3)
    assert storage.probe(allow_single_writer=True) is storage
    storage.mark_single_writer()
    assert not storage.exists(SINGLE_WRITER_PATH)


def test_a_store_that_rejects_the_header_is_one_without_it(s3: str, proxy: Proxy, s3_endpoint: str) -> None:
    creates: list[str] = []

    def rule(method: str, target: str) -> str | None:
        # s3fs sends the header with a create only: every second of the probe's puts
        if method == "PUT" and ".probe-" in target and not creates.count(target) % 2:
            creates.append(target)
            return "501 NotImplemented"
        if method == "PUT":
            creates.append(target)
        return None

    proxy.rule = rule
    with pytest.raises(UsageError, match="--single-writer"):
        Storage.open(s3).probe()
    creates.clear()
    assert Storage.open(s3).probe(allow_single_writer=True).single_writer


def test_a_lost_answer_does_not_make_the_probe_doubt_the_store(s3: str, proxy: Proxy) -> None:
    proxy.rule = once("drop", method="PUT")
    store = Storage.open(s3)
    assert store.probe() is store
    assert proxy.made


def test_a_listing_that_is_not_allowed_is_refused_before_anything_is_made(
    s3: str, proxy: Proxy, manifest: Manifest, tiny_model: Path
) -> None:
    proxy.rule = always("403 AccessDenied", method="GET", target="list-type")
    with pytest.raises(UsageError, match=r"cannot list _job.*AccessDenied.*grant read, write and list"):
        run(job_spec(tiny_model, manifest(PROMPTS), s3))
    proxy.rule = always("403 AccessDenied", method="GET", target="ledger")
    with pytest.raises(JobError, match=r"cannot list ledger.*AccessDenied"):
        run(job_spec(tiny_model, manifest(PROMPTS), s3))


def test_one_stalled_request_does_not_end_the_first_probe(
    s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client waits longer for one answer than the probe once did for all of them."""
    monkeypatch.setattr(clients, "ANSWER_SECONDS", 6)
    s3fs.S3FileSystem.clear_instance_cache()
    store = Storage.open(s3)
    proxy.rule = once("stall", method="PUT")
    assert store.probe() is store
    assert proxy.made


@pytest.mark.usefixtures("_without_pauses")
@pytest.mark.parametrize("verb", ["list_hidden", "read"])
def test_a_store_that_shows_late_what_it_took_is_waited_for(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, late = Storage.open(str(tmp_path)), [3]
    prompt = getattr(store._backend, verb)

    def answer(*arguments: object) -> object:
        late[0] -= 1
        if late[0] < 0:
            return prompt(*arguments)
        if verb == "read":
            raise FileNotFoundError("not yet")
        return iter([])

    monkeypatch.setattr(store._backend, verb, answer)
    assert store.probe() is store
    late[0] = 10**6
    with pytest.raises(UsageError, match=r"does not show what was written.*use a store whose reads and listings are"):
        store.probe()


def test_a_read_back_that_is_refused_says_so(s3: str, proxy: Proxy) -> None:
    """The create is refused and nobody may look: that does not make the record one that does not exist."""
    ledger = Ledger(storage=Storage.open(s3), plan_hash="a" * 64, n_chunks=9, schema=pa.schema([]))
    ledger.storage.write(record_path(7), b"somebody's")
    proxy.rule = always("403 AccessDenied", method="GET")
    with pytest.raises(StorageError, match=r"cannot read ledger/00000/00000007.parquet.*AccessDenied.*grant read"):
        ledger.commit(7, "mine", b"mine")
