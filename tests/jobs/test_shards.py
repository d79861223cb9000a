"""A row of machines that know nothing of each other: each makes its part, and whoever is last publishes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.job_file import resolve
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.runner import SHARD_DONE
from tests.jobs.driver import committed_generations, job_spec, read_dataset, run, start
from tests.jobs.fakes import broken_engine
from tests.jobs.traps import KillAt


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_its_rerun_completes_the_dataset(
    tiny_model: Path, manifest, tmp_path: Path
):
    prompts, out = manifest([f"picture {number}" for number in range(24)]), str(tmp_path / "out")
    run(job_spec(tiny_model, prompts, tmp_path / "calm"))
    logs = [tmp_path / f"log {number}" for number in range(4)]
    specs = [job_spec(tiny_model, prompts, out, shard=f"{number + 1}/4") for number in range(4)]
    deaths = [None, None, KillAt("before", "create", "ledger/", 2), None]
    processes = [start(spec, log, kill_at=death) for spec, log, death in zip(specs, logs, deaths, strict=True)]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    assert codes == [SHARD_DONE, SHARD_DONE, -signal.SIGKILL, SHARD_DONE], logs[0].read_text()
    assert [committed_generations(log) for log in logs] == [6, 6, 0, 6]
    assert status(out).state == "started"
    assert run(specs[2]).exit_code == 0
    assert read_dataset(out) == read_dataset(str(tmp_path / "calm"))
    assert verify(out).defects == ()
    again = [run(spec) for spec in specs]
    assert [(summary.exit_code, summary.generated) for summary in again] == [(0, 0)] * 4


def test_a_shard_makes_every_nth_chunk_and_counts_only_them(tiny_model: Path, manifest, tmp_path: Path):
    seen = []
    spec = job_spec(tiny_model, manifest(13), tmp_path / "out", shard="2/3")
    summary = run(spec, on_progress=seen.append)
    assert (summary.exit_code, summary.generated, summary.shard) == (SHARD_DONE, 4, "2/3")
    assert open_job(spec.out).ledger.committed().nonzero()[0].tolist() == [1, 4]
    assert (seen[-1].phase, seen[-1].done, seen[-1].total, seen[-1].chunks_total) == ("done", 4, 4, 2)
    done = run(spec, engine_factory=broken_engine)
    assert (done.exit_code, done.executor, done.generated) == (SHARD_DONE, "nothing to do", 0)
    assert summary.counts is None
    assert run(job_spec(tiny_model, manifest(13), tmp_path / "out")).generated == 9


def test_more_shards_than_chunks_are_no_fault(tiny_model: Path, manifest, tmp_path: Path):
    specs = [job_spec(tiny_model, manifest(2), tmp_path / "out", shard=f"{number}/3") for number in (3, 2, 1)]
    assert [run(spec).exit_code for spec in specs] == [SHARD_DONE, SHARD_DONE, 0]


def test_each_shard_repairs_its_own_failures(tiny_model: Path, manifest, tmp_path: Path):
    prompts = manifest(["a", "poison", "c", "some poison"])
    assert run(job_spec(tiny_model, prompts, tmp_path / "out")).exit_code == 1
    for number in (1, 2):
        spec = job_spec(tiny_model, prompts, tmp_path / "out", shard=f"{number}/2", retry_failed=True)
        summary = run(spec)
        assert (summary.exit_code, summary.generated, summary.counts) == (1, 1, {"ok": 2, "flagged": 0, "failed": 2})


@pytest.mark.parametrize("shard", ["0/4", "5/4", "3", "1/0", "a/b", " 1/2", "1/2 "])
def test_what_is_no_shard_is_refused(shard: str):
    with pytest.raises(UsageError, match=r"shard is .*, expected I/N"):
        resolve(None, {"prompts": ["a.txt"], "shard": shard})
