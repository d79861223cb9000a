"""A cluster that a whole test session shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster, cluster


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
