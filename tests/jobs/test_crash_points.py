"""Killed anywhere, the same command goes on, and the dataset is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.cluster import cluster
from tests.jobs.crash_points import AT_ONCE, CLUSTER_CPUS, INLINE, RAY, S3, CrashPoint, Outcome, Stage, play

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # the first test waits for a share of all the others

POINTS = (*RAY, *INLINE, *S3)  # the longest first

Outcomes = Mapping[CrashPoint, Future[Outcome]]


@pytest.fixture(scope="module")
def outcomes(
    tiny_model: Path, s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcomes]:
    """All crash points, several at once: each test waits for its own."""
    folder = tmp_path_factory.mktemp("crash")
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(head_cpus=CLUSTER_CPUS) as nodes,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        stage = Stage(folder=folder, model=tiny_model, s3=s3_environment, cluster=nodes)
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        assert stage.undisturbed
        yield {point: pool.submit(play, point, stage) for point in POINTS}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_killed_and_resumed(point: CrashPoint, outcomes: Outcomes) -> None:
    outcome = outcomes[point].result()
    assert outcome.killed, f"nothing died: {outcome.log}"
    first_exit, resumed_exit = outcome.exits
    assert first_exit == (-signal.SIGKILL if point.victim == "driver" else outcome.expected_exit), outcome.log
    assert resumed_exit == outcome.expected_exit, outcome.log
    assert outcome.equal, outcome.log
    assert outcome.defects == ()
    assert outcome.made_again <= (outcome.chunks - outcome.committed) * outcome.chunk_size, "a committed chunk was made"
