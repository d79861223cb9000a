"""Clusters of several nodes: who is let in, and what becomes of a job when nodes join and die."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from latentmill.jobs.code import code_files, own_code, package_root, read_code
from latentmill.jobs.errors import UsageError
from latentmill.jobs.executors.ray_cluster import asks_for_a_token, connect
from latentmill.jobs.ledger.records import decode_record
from latentmill.jobs.models.place import place_model
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.store.storage import Storage
from tests.harness.cluster import ROOT, Cluster, Node, cluster
from tests.harness.processes import below
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import FakeEngine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray 2.60 uses its own old settings
]


@pytest.fixture(scope="module")
def open_cluster() -> Iterator[Cluster]:
    """A head that serves anyone."""
    with cluster(token=False) as nodes:
        yield nodes


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process has no token, in no place where Ray would look."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # whatever Ray itself sets in the environment goes with the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def member(stranger: None, guarded: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The guarded cluster, and its token in this process's environment."""
    for name, value in guarded.client_environment.items():
        monkeypatch.setenv(name, value)
    return guarded


def test_a_cluster_that_serves_anyone_is_refused_unless_the_user_insists(stranger: None, open_cluster: Cluster):
    assert not asks_for_a_token(open_cluster.address)
    with pytest.raises(UsageError, match=r"for anyone who can reach it.*RAY_AUTH_MODE=token.*0600.*--insecure-ray"):
        connect(open_cluster.address)
    connection = connect(open_cluster.address, insecure=True)
    try:
        assert [node["Resources"]["CPU"] for node in connection.nodes()] == [1]
    finally:
        connection.close()


def test_a_token_of_the_client_does_not_make_an_open_cluster_a_guarded_one(
    stranger, open_cluster: Cluster, monkeypatch
):
    """The question is what the cluster enforces, not what this client happens to have."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with pytest.raises(UsageError, match="for anyone who can reach it"):
        connect(open_cluster.address)


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_stranger_is_told_what_the_cluster_asks_for(stranger, guarded: Cluster, monkeypatch, token: str | None):
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(UsageError, match=r"asks for a token.*RAY_AUTH_MODE=token.*RAY_AUTH_TOKEN_PATH") as refused:
        connect(guarded.address)
    assert guarded.token_file.read_text() not in str(refused.value)


def test_nobody_submits_code_without_the_token(guarded: Cluster, tmp_path: Path):
    """CVE-2023-48022: the jobs API of an open dashboard is remote code execution for everyone."""
    canary = tmp_path / "canary"
    body = json.dumps({"entrypoint": f"touch {canary}"}).encode()
    for header in ({}, {"Authorization": "Bearer wrong"}):
        request = urllib.request.Request(
            f"{guarded.dashboard}/api/jobs/", data=body, headers={"Content-Type": "application/json", **header}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        refused.value.close()
        assert refused.value.code in {401, 403}
    assert not canary.exists()


def test_a_cluster_of_our_own_asks_for_a_token_that_nobody_else_can_read(stranger, monkeypatch):
    """Ray itself writes its token for all to read; ours lies in a private folder and goes with the cluster."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "an older one")
    connection = connect(None)
    try:
        import ray

        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600
        assert token.parent.stat().st_mode & 0o777 == 0o700
        assert asks_for_a_token(ray.get_runtime_context().gcs_address)
    finally:
        connection.close()
    assert not token.exists()
    assert os.environ["RAY_AUTH_TOKEN"] == "an older one"
    assert not Path("~/.ray").expanduser().exists()
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ)


GATE = "LATENTMILL_TEST_GATE"


class PacedEngine(FakeEngine):
    """A second for a chunk until the test has seen enough, and no time afterwards."""

    def generate(self, requests):
        self.pause = 0.0 if Path(os.environ[GATE]).exists() else 1.0
        return super().generate(requests)


def paced_engine(plan: Plan, device: str) -> PacedEngine:
    return PacedEngine(batch_size=plan.batch_size)


def pid_of(node: Node) -> int:
    assert node.process is not None
    return node.process.pid


class Scenario(threading.Thread):
    """Looks at the ledger while a job runs, adds a node, and takes another away; remembers who made which chunk."""

    def __init__(self, nodes: Cluster, out: str, gate: Path) -> None:
        super().__init__(daemon=True)
        self.makers: dict[int, str] = {}
        self.after_death: list[str] = []
        self.fault: BaseException | None = None
        self._nodes = nodes
        self._storage = Storage.open(out)
        self._gate = gate
        self._owners: dict[str, str] = {}
        self._names: dict[int, str] = {}

    def run(self) -> None:
        try:
            first = self._nodes.workers[0]
            self._names = {pid_of(self._nodes.head): "head", pid_of(first): "dies"}
            self._wait_for({"head", "dies"})
            second = self._nodes.add_worker(cpus=1)
            self._names[pid_of(second)] = "joins"
            self._wait_for({"joins"})
            first.kill()
            time.sleep(1)  # what it had committed by then is in the ledger
            self._look()
            known = set(self.makers)
            self._wait_until(lambda: len(self.makers) >= len(known) + 6)
            self.after_death = [maker for chunk, maker in self.makers.items() if chunk not in known]
        except BaseException as fault:  # noqa: BLE001 - a thread has nobody else to tell
            self.fault = fault
        finally:
            self._gate.touch()

    def _wait_for(self, names: set[str]) -> None:
        self._wait_until(lambda: names <= set(self.makers.values()))

    def _wait_until(self, true) -> None:
        deadline = time.monotonic() + 240  # some seconds where nothing else runs
        while not true():
            assert time.monotonic() < deadline, Counter(self.makers.values())
            time.sleep(0.3)
            self._look()

    def _look(self) -> None:
        for pid, name in self._names.items():
            self._owners |= dict.fromkeys((str(process.pid) for process in below(pid)), name)
        for path, _ in self._storage.list("ledger"):
            record = decode_record(self._storage.read(path))
            if record.chunk not in self.makers:
                pid = record.metadata["actor"].rpartition(":")[2]
                self.makers[record.chunk] = self._owners.get(pid, "unknown")


@pytest.mark.timeout(600)
def test_nodes_join_and_die_while_a_job_runs(stranger, monkeypatch, tiny_model: Path, manifest, tmp_path: Path):
    """Three raylets, one core each: work is spread, the late node is used, the dead one's chunks are made elsewhere."""
    gate, out = tmp_path / "gate", str(tmp_path / "rough")
    monkeypatch.setenv(GATE, str(gate))
    prompts = manifest(300)
    run(job_spec(tiny_model, prompts, tmp_path / "calm"))
    with cluster(head_cpus=1, environment={GATE: str(gate)}) as nodes:
        for name, value in nodes.client_environment.items():
            monkeypatch.setenv(name, value)
        nodes.add_worker(cpus=1)
        scenario = Scenario(nodes, out, gate)
        scenario.start()
        spec = job_spec(tiny_model, prompts, out, executor="ray", address=nodes.address)
        summary = run(spec, engine_factory=paced_engine)
        scenario.join(10)
    assert scenario.fault is None
    assert set(scenario.makers.values()) >= {"head", "dies", "joins"}
    assert {"joins", "head"} >= set(scenario.after_death) >= {"joins"}
    assert (summary.exit_code, summary.counts) == (0, {"ok": 300, "flagged": 0, "failed": 0})
    assert len(list(Storage.open(out).list("ledger"))) == 150
    assert read_dataset(out) == read_dataset(str(tmp_path / "calm"))


COPY = "LATENTMILL_TEST_COPY"


def copied_engine(plan: Plan, device: str) -> FakeEngine:
    """A node with a copy of the model of its own checks that one, as every node checks what it has."""
    if os.environ.get(COPY):
        place_model(replace(plan.model, source=os.environ[COPY]))
    return FakeEngine(batch_size=plan.batch_size, pause=0.3)


@pytest.mark.timeout(600)
def test_a_node_with_corrupt_weights_is_named_and_left_out(
    stranger, monkeypatch, tiny_model: Path, manifest, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with cluster(head_cpus=1) as nodes:
        for name, value in nodes.client_environment.items():
            monkeypatch.setenv(name, value)
        nodes.environment[COPY] = str(copy)
        nodes.add_worker(cpus=1)
        wait_for_nodes(nodes, 2)
        spec = job_spec(tiny_model, manifest(30), tmp_path / "out", executor="ray", address=nodes.address)
        summary = run(spec, engine_factory=copied_engine)
    assert (summary.exit_code, summary.counts) == (0, {"ok": 30, "flagged": 0, "failed": 0})
    assert len(summary.left_out) == 1
    assert "the model could not be loaded" in summary.left_out[0]
    assert "unet/diffusion_pytorch_model.safetensors" in summary.left_out[0]


@pytest.mark.timeout(600)
def test_a_node_with_other_code_or_without_a_package_is_named_and_left_out(
    stranger, monkeypatch, tiny_model: Path, manifest, tmp_path: Path
):
    other, bare = tmp_path / "other", tmp_path / "bare"
    for path in code_files(package_root()):
        if path.suffix == ".py":
            copy = other / "latentmill" / path.relative_to(package_root())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (other / "latentmill/jobs/worker.py").write_text("raise RuntimeError('the wrong code ran')")
    bare.mkdir()
    (bare / "PIL.py").write_text("raise ModuleNotFoundError('No module named PIL')")
    with cluster(head_cpus=1) as nodes:
        for name, value in nodes.client_environment.items():
            monkeypatch.setenv(name, value)
        for number, folder in enumerate((other, bare), start=2):
            nodes.environment["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
            nodes.add_worker(cpus=1)
            wait_for_nodes(nodes, number)
        spec = job_spec(tiny_model, manifest(40), tmp_path / "out", executor="ray", address=nodes.address)
        summary = run(spec, engine_factory=copied_engine)
    assert (summary.exit_code, summary.counts) == (0, {"ok": 40, "flagged": 0, "failed": 0})
    refused, missing = sorted(summary.left_out, key=lambda text: "cannot start" in text)
    assert str(read_code(other / "latentmill")) in refused
    assert f"this command runs {own_code()}" in refused
    assert "latentmill submit" in refused
    assert "latentmill cannot start: ModuleNotFoundError: No module named PIL" in missing


def wait_for_nodes(nodes: Cluster, number: int) -> None:
    connection = connect(nodes.address)
    try:
        deadline = time.monotonic() + 240  # some seconds where nothing else runs
        while sum(node["Alive"] for node in connection.nodes()) < number:
            assert time.monotonic() < deadline
            time.sleep(0.3)
    finally:
        connection.close()
