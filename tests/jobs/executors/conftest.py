"""A cluster that a whole test session shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def guarded(s3_environment: dict[str, str]) -> Iterator[Cluster]:
    """A head that asks for a token, with a dashboard, whose nodes reach the S3 server and have none of our code."""
    with cluster(head_cpus=3, dashboard=True, environment={**s3_environment, "PYTHONPATH": ""}) as nodes:
        yield nodes
