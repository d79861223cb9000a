"""Killed anywhere, the same command goes on, and the dataset is that of an undisturbed run, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.jobs.crash_points import INLINE, S3, CrashPoint, Outcome, Stage, play

AT_ONCE = 4

Outcomes = Mapping[CrashPoint, Future[Outcome]]


@pytest.fixture(scope="module")
def outcomes(
    tiny_model: Path, s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcomes]:
    """All crash points, several at once: each test waits for its own."""
    stage = Stage(folder=tmp_path_factory.mktemp("crash"), model=tiny_model, s3=s3_environment)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(AT_ONCE) as pool:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        assert stage.undisturbed
        yield {point: pool.submit(play, point, stage) for point in (*INLINE, *S3)}


@pytest.mark.parametrize("point", [*INLINE, *S3], ids=lambda point: point.name)
def test_killed_and_resumed(point: CrashPoint, outcomes: Outcomes) -> None:
    outcome = outcomes[point].result()
    assert outcome.killed, f"nothing died: {outcome.log}"
    assert outcome.resumed_exit == (0 if point.real else 1), outcome.log
    assert outcome.equal, outcome.log
    assert outcome.defects == ()
