"""Prompts that break their worker: found, named, and alone in failing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.errors import JobError, OutputConflictError
from latentmill.jobs.executors.chunk_runner import ChunkRunner
from latentmill.jobs.executors.isolation import DIED, isolate
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.postprocess import ProcessedSample
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import ChunkGenerator
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import FakeEngine, broken_engine, fake_engine


def rows_of(out: Path | str) -> dict[str, str | None]:
    """Each prompt's error; None where it was made."""
    rows = read_dataset(str(out)).rows.to_pylist()
    return {row["prompt"]: row["error"] for row in rows}


def test_a_prompt_that_raises_fails_alone_and_the_others_are_as_ever(manifest, tiny_model, tmp_path):
    prompts = [f"picture {number}" for number in range(10)]
    run(job_spec(tiny_model, manifest(prompts), tmp_path / "calm", chunk_size=8, batch_size=4))
    prompts[5] = "crash"
    summary = run(job_spec(tiny_model, manifest(prompts), tmp_path / "out", chunk_size=8, batch_size=4))
    assert (summary.exit_code, summary.counts) == (1, {"ok": 9, "flagged": 0, "failed": 1})
    errors = rows_of(tmp_path / "out")
    assert errors.pop("crash") == "RuntimeError: this prompt raises"
    assert set(errors.values()) == {None}
    calm, rows = (read_dataset(str(tmp_path / name)).rows.to_pylist() for name in ("calm", "out"))
    same = [name for name in calm[0] if name not in {"image", "prompt", "error", "status"}]
    for number in {*range(10)} - {5}:  # the slot in the batch among them, though each of the eight ran by itself
        assert {name: calm[number][name] for name in same} == {name: rows[number][name] for name in same}
    assert verify(str(tmp_path / "out")).defects == ()


def test_a_broken_machine_convicts_nobody(manifest, tiny_model, tmp_path):
    with pytest.raises(JobError, match=r"so does a batch of empty prompts.*its prompts are sound"):
        run(job_spec(tiny_model, manifest(4), tmp_path / "out"), engine_factory=broken_engine)
    assert not open_job(str(tmp_path / "out")).ledger.committed().any()


@dataclass
class HungryEngine(FakeEngine):
    """Not enough memory for one of the sizes, whatever the prompt."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        if requests[0].width > 64:
            raise MemoryError(f"CUDA out of memory at {requests[0].width} pixels")
        return super().generate(requests)


def hungry_engine(plan, device):
    return HungryEngine(batch_size=plan.batch_size)


def test_a_size_that_does_not_fit_the_memory_fails_by_itself_and_is_repaired_where_there_is_more(
    manifest, tiny_model, tmp_path
):
    out = tmp_path / "out"
    spec = job_spec(tiny_model, manifest(4), out, sweep={"width": [64, 128]})
    summary = run(spec, engine_factory=hungry_engine)
    assert (summary.exit_code, summary.counts) == (1, {"ok": 4, "flagged": 0, "failed": 4})
    rows = read_dataset(str(out)).rows.to_pylist()
    failed = {"MemoryError: CUDA out of memory at 128 pixels"}
    assert {row["width"]: row["error"] for row in rows} == {64: None, 128: failed.pop()}
    again = run(job_spec(tiny_model, manifest(4), out, sweep={"width": [64, 128]}, retry_failed=True))
    assert (again.exit_code, again.generated, again.counts) == (0, 4, {"ok": 8, "flagged": 0, "failed": 0})
    run(job_spec(tiny_model, manifest(4), tmp_path / "calm", sweep={"width": [64, 128]}))
    repaired, calm = read_dataset(str(out)), read_dataset(str(tmp_path / "calm"))
    assert repaired.files == calm.files
    assert verify(str(out)).defects == ()


def test_where_nothing_fits_the_memory_nothing_is_committed(manifest, tiny_model, tmp_path):
    with pytest.raises(JobError, match="plan the job with a smaller --batch-size"):
        run(
            job_spec(tiny_model, manifest(4), tmp_path / "out", width=128),
            engine_factory=hungry_engine,
        )
    assert not open_job(str(tmp_path / "out")).ledger.committed().any()


def test_what_fails_again_stays_failed_and_can_be_tried_again(manifest, tiny_model, tmp_path):
    spec = job_spec(tiny_model, manifest(["a", "poison", "c"]), tmp_path / "out")
    assert run(spec).exit_code == 1
    again = replace(spec, runtime=replace(spec.runtime, retry_failed=True))
    for _ in range(2):
        summary = run(again)
        assert (summary.exit_code, summary.generated, summary.counts) == (1, 1, {"ok": 2, "flagged": 0, "failed": 1})
    assert not list((tmp_path / "out" / "ledger").rglob("*.r*"))


DEATH = ChunkResult(chunk=0, outcome="error", error=DIED, blame="chunk")


@dataclass
class Script:
    """An isolated worker whose calls end as they are told to: a row that is in `deadly` dies so many times."""

    runner: ChunkRunner
    job: Job
    deadly: dict[int, int]
    machine: ChunkResult | None = None
    store: ChunkResult | None = None
    calls: list[str] = field(default_factory=list)
    execution_class: str = "fake"

    def chunk(self, chunk: int, *, repair: bool) -> ChunkResult:
        self.calls.append("chunk")
        return DEATH

    def row(self, chunk: int, row: int) -> ProcessedSample | ChunkResult:
        self.calls.append(f"row {row}")
        if self.store is not None:
            return self.store
        if self.deadly.get(row, 0) > 0:
            self.deadly[row] -= 1
            return DEATH
        return self.runner.row(chunk, row)

    def control(self, chunk: int) -> ChunkResult | None:
        self.calls.append("control")
        return self.machine

    def commit(self, chunk: int, samples: Sequence[ProcessedSample], repair: int) -> ChunkResult:
        return self.runner.commit(chunk, samples, repair)


@pytest.fixture
def script(manifest, tiny_model, tmp_path) -> Script:
    out = str(tmp_path / "out")
    with draft_plan(job_spec(tiny_model, manifest(4), out, chunk_size=4)) as draft:
        adopt(draft, Storage.open(out))
    job = open_job(out)
    return Script(ChunkRunner(job, engine_factory=fake_engine), job, {})


def test_three_deaths_alone_and_not_two_make_a_culprit(script: Script):
    result = isolate(script.job, replace(script, deadly={1: 2, 2: 3}), 0, range(4), stopping=lambda: False)
    assert (result.outcome, result.ok, result.failed) == ("committed", 3, 1)
    assert script.calls == ["chunk"] * 3 + ["control", "row 0"] + ["row 1"] * 3 + ["row 2"] * 3 + ["row 3"]
    record = script.job.ledger.read(0)
    assert record is not None
    assert record.table.column("error").to_pylist() == [None, None, DIED, None]
    assert record.table.column("batch_slot").to_pylist() == [0, 1, 0, 1]


def test_an_interrupted_isolation_leaves_the_chunk_open(script: Script):
    stop = iter([False, False, True])
    result = isolate(script.job, script, 0, range(4), stopping=lambda: next(stop))
    assert result.outcome == "skipped"
    assert script.job.ledger.read(0) is None


def test_a_store_that_fails_while_a_row_runs_convicts_nobody_and_is_not_tried_again(script: Script):
    full = ChunkResult(chunk=0, outcome="error", error="no space left", blame="store")
    assert isolate(script.job, replace(script, store=full), 0, range(4), stopping=lambda: False) is full
    assert script.calls == ["chunk"] * 3 + ["control", "row 0"]
    assert script.job.ledger.read(0) is None


def test_what_a_step_raises_is_told_with_its_blame(script: Script, monkeypatch):
    def raising(error: Exception) -> Callable[..., object]:
        def generate(*_: object, **__: object) -> object:
            raise error

        return generate

    for error, blame in (
        (RuntimeError("boom"), "chunk"),
        (MemoryError("x"), "chunk"),
        (JobError("x"), "elsewhere"),
        (StorageError("full"), "store"),
        (OutputConflictError("another plan"), "conflict"),
    ):
        monkeypatch.setattr(ChunkGenerator, "sample", raising(error))
        monkeypatch.setattr(ChunkGenerator, "process_row", raising(error))
        monkeypatch.setattr(ChunkGenerator, "generate_control", raising(error))
        told = [script.runner.chunk(0), script.runner.row(0, 1), script.runner.control(0)]
        assert [(result.outcome, result.blame) for result in told] == [("error", blame)] * 3
        assert str(error) in told[0].error
