"""Clusters that a whole test session shares: the tests that use them are about something else."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def shared_cluster(s3_environment: dict[str, str]) -> Iterator[Cluster]:
    """A head with two CPUs that asks for a token, whose workers import from this folder and reach the S3 server."""
    with cluster(head_cpus=2, environment=s3_environment) as nodes:
        yield nodes


@pytest.fixture
def ray_cluster(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The shared cluster, and its token in this process's environment."""
    for name, value in shared_cluster.client_environment.items():
        monkeypatch.setenv(name, value)
    return shared_cluster


@pytest.fixture(scope="session")
def guarded(s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that asks for a token, with a dashboard; its nodes reach the S3 server, have none of our code, and a bad
    `python` on their PATH."""
    bad = tmp_path_factory.mktemp("bin") / "python"
    bad.write_text("#!/bin/sh\necho this is not the Python of Ray; exit 9")
    bad.chmod(0o755)
    environment = {**s3_environment, "PYTHONPATH": "", "PATH": f"{bad.parent}{os.pathsep}{os.environ['PATH']}"}
    with cluster(head_cpus=3, dashboard=True, environment=environment) as nodes:
        yield nodes
