"""What failed is told from the dataset alone: in order, no more than asked for, and by the effective rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.failures import FailedRow, failed_rows
from latentmill.jobs.outputs.publish import publish
from tests.jobs.driver import job_spec, run
from tests.jobs.outputs.repairs import repair

PROMPTS = ["one", "poison two", "three", "poison four", "poison \x1b[31mfive", "six"]


@pytest.fixture
def out(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> str:
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


def test_the_first_failed_rows_of_all_parts(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = open_job(out)
    for path, _ in list(job.storage.list("dataset")):
        job.storage.delete(path)
    publication = publish(job, rows_per_part=2)
    error = "this prompt is poison"
    first = FailedRow(sample_id="00000001", row_id="2", prompt="poison two", error=error)
    found = failed_rows(job, publication)
    assert found[0] == first
    assert [row.prompt for row in found] == ["poison two", "poison four", "poison \x1b[31mfive"]
    reads: list[str] = []
    read = job.storage._backend.read
    monkeypatch.setattr(job.storage._backend, "read", lambda path, limit: reads.append(path) or read(path, limit))
    assert failed_rows(job, publication, limit=1) == (first,)
    assert reads == [publication.parts[0].path]


def test_what_is_repaired_has_not_failed(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in range(3):
        repair(out, chunk)
    job = open_job(out)
    publication = publish(job)
    monkeypatch.setattr(job.storage._backend, "read", lambda path, _: pytest.fail(f"{path} was read"))
    assert failed_rows(job, publication) == ()


def test_parts_that_were_removed_have_nothing_to_say(out: str) -> None:
    job = open_job(out)
    publication = publish(job)
    job.storage.delete(publication.parts[0].path)
    assert failed_rows(job, publication) == ()
