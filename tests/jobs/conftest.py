"""Clusters that a whole test session shares: the tests that use them are about something else."""

from __future__ import annotations

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
def guarded(s3_environment: dict[str, str]) -> Iterator[Cluster]:
    """A head that asks for a token, with a dashboard, whose nodes reach the S3 server and have none of our code."""
    with cluster(head_cpus=3, dashboard=True, environment={**s3_environment, "PYTHONPATH": ""}) as nodes:
        yield nodes
