"""Clusters of several nodes: who is let in, and what becomes of a job when nodes join and die."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.executors.ray_cluster import asks_for_a_token, connect
from tests.jobs.executors.nodes import Nodes, cluster

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # Ray 2.60 uses its own old settings


@pytest.fixture(scope="module")
def guarded() -> Iterator[Nodes]:
    """A head with two CPUs that asks for a token, with a dashboard."""
    with cluster(head_cpus=2, dashboard=True) as nodes:
        yield nodes


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process has no token, in no place where Ray would look."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # whatever Ray itself sets in the environment goes with the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def member(stranger: None, guarded: Nodes, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """The guarded cluster, and its token in this process's environment."""
    for name, value in guarded.client_environment.items():
        monkeypatch.setenv(name, value)
    return guarded


def test_a_cluster_that_serves_anyone_is_refused_unless_the_user_insists(stranger: None):
    with cluster(token=False) as nodes:
        assert not asks_for_a_token(nodes.address)
        with pytest.raises(UsageError, match=r"for anyone who can reach it.*RAY_AUTH_MODE=token.*0600.*--insecure-ray"):
            connect(nodes.address)
        connection = connect(nodes.address, insecure=True)
        try:
            assert connection.resources()["CPU"] == 1
        finally:
            connection.close()


def test_a_token_of_the_client_does_not_make_an_open_cluster_a_guarded_one(stranger, monkeypatch, tmp_path):
    """The question is what the cluster enforces, not what this client happens to have."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with cluster(token=False) as nodes, pytest.raises(UsageError, match="for anyone who can reach it"):
        connect(nodes.address)


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_stranger_is_told_what_the_cluster_asks_for(stranger, guarded: Nodes, monkeypatch, token: str | None):
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(UsageError, match=r"asks for a token.*RAY_AUTH_MODE=token.*RAY_AUTH_TOKEN_PATH") as refused:
        connect(guarded.address)
    assert guarded.token_file.read_text() not in str(refused.value)


def test_nobody_submits_code_without_the_token(guarded: Nodes, tmp_path: Path):
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
