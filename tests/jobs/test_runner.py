"""From a spec to a published dataset, with the real engine and with faults."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from latentmill.engine import EngineError, GenerationRequest, GenerationResult
from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.executors.inline import InlineExecutor
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.progress import Progress
from latentmill.jobs.runner import run_job
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.local import LocalFolder
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import PROCESSES, job_spec, read_dataset, run
from tests.jobs.fakes import FakeEngine, fake_engine

Manifest = Callable[..., Path]


def test_a_real_model_end_to_end(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    spec = job_spec(
        tiny_model, manifest(3), out, width=256, height=256, watermark="dwtDctSvd", num_images=1, chunk_size=2
    )
    seen: list[Progress] = []
    summary = run_job(spec, on_progress=seen.append)
    assert summary.exit_code == 0
    assert summary.counts == {"ok": 3, "flagged": 0, "failed": 0}
    assert summary.generated == 3
    assert [progress.phase for progress in seen][-2:] == ["publishing", "done"]
    assert (seen[-1].done, seen[-1].total, seen[-1].chunks_done, seen[-1].chunks_total) == (3, 3, 2, 2)
    report = verify(out)
    assert report.defects == ()
    assert (report.rows, report.images_checked) == (3, 3)
    rows = read_dataset(out).rows.to_pylist()
    assert [row["nsfw_checker"] for row in rows] == ["open-nsfw"] * 3
    assert all(row["watermark_bit_accuracy"] >= 0.9 for row in rows)
    assert len({row["pixel_sha256"] for row in rows}) == 3
    assert status(out).to_dict()["state"] == "published"


def test_status_follows_a_job(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    spec = job_spec(tiny_model, manifest(["one", "some nsfw", "three", "four"]), out)
    with pytest.raises(UsageError):
        status(out)
    run(spec)
    for path in ["ledger/00000/00000001.parquet", "_job/dataset.json"]:
        Storage.open(out).delete(path)
    report = status(out, deep=True)
    assert (report.state, report.chunks_committed, report.chunks) == ("started", 1, 2)
    assert report.counts == {"ok": 1, "flagged": 1, "failed": 0}
    assert status(out).counts is None


def test_a_chunk_that_fails_twice_is_committed_at_the_third_try(
    manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    calls = itertools.count()

    @dataclass
    class Flaky(FakeEngine):
        def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
            if "one" in requests[0].prompt and next(calls) < 2:
                raise RuntimeError("the device hiccups")
            return super().generate(requests)

    spec = job_spec(tiny_model, manifest(["one", "two", "three", "four"]), tmp_path / "out")
    summary = run(spec, engine_factory=lambda plan, device: Flaky(batch_size=plan.batch_size))
    assert summary.exit_code == 0
    assert summary.generated == 4


def test_another_plan_is_refused_and_nothing_changes(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = manifest(3)
    run(job_spec(tiny_model, prompts, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputConflictError, match="seed"):
        run(job_spec(tiny_model, prompts, out, seed=7))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_execution_settings_do_not_belong_to_the_plan(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    prompts = manifest(3)
    run(job_spec(tiny_model, prompts, tmp_path / "out"))
    assert run(job_spec(tiny_model, prompts, tmp_path / "out", num_actors=7)).generated == 0


def test_an_output_made_again_in_one_process_is_read_afresh(
    manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "out"
    run(job_spec(tiny_model, manifest(3), out))
    shutil.rmtree(out)
    summary = run(job_spec(tiny_model, manifest(5), out))
    assert summary.counts == {"ok": 5, "flagged": 0, "failed": 0}
    assert verify(str(out)).defects == ()


def test_progress_counts_what_the_ledger_holds(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    prompts = manifest(["a", "b", "poison", "nsfw", "e"])
    summary = run(job_spec(tiny_model, prompts, tmp_path / "out"), on_progress=seen.append)
    assert summary.exit_code == 1
    last = seen[-1]
    assert (last.ok, last.flagged, last.failed, last.done) == (3, 1, 1, 5)
    assert all(earlier.done <= later.done for earlier, later in itertools.pairwise(seen))
    assert any(progress.eta_seconds is not None for progress in seen)


@dataclass
class _Recorder:
    """An engine factory that remembers its engines."""

    engines: list[FakeEngine] = field(default_factory=list)

    def __call__(self, plan: Plan, device: str) -> FakeEngine:
        self.engines.append(fake_engine(plan, device))
        return self.engines[-1]


def test_the_executor_asks_the_ledger_before_it_generates(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(6), out))
    recorder = _Recorder()
    results = list(InlineExecutor(open_job(out), engine_factory=recorder).run([0, 1, 2]))
    assert [(result.outcome, result.ok) for result in results] == [("already", 2)] * 3
    assert [engine.generated for engine in recorder.engines] == [0]


def test_a_full_disk_ends_in_one_line_and_is_resumed(
    manifest: Manifest, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job_spec(tiny_model, manifest(6), tmp_path / "out")
    place, calls = LocalFolder._place, itertools.count()

    def full(self: LocalFolder, path: str, data: bytes, publish: Callable[..., object]) -> None:
        if path.startswith("images/") and next(calls) >= 3:
            raise OSError(28, "No space left on device")
        place(self, path, data, publish)

    monkeypatch.setattr(LocalFolder, "_place", full)
    with pytest.raises(JobError, match=r"No space left on device; free some space") as caught:
        run(spec)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    summary = run(spec)
    assert (summary.exit_code, summary.generated) == (0, 4)
    assert verify(str(tmp_path / "out")).defects == ()


def test_a_job_in_memory(manifest: Manifest, tiny_model: Path) -> None:
    out = f"memory://{secrets.token_hex(6)}"
    assert run(job_spec(tiny_model, manifest(3), out)).exit_code == 0
    assert verify(out).defects == ()


def test_a_published_dataset_whose_records_and_parts_were_lost_is_made_whole(
    manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spec = job_spec(tiny_model, manifest(6), out)
    run(spec)
    whole = read_dataset(str(out))
    for path in [*(out / "dataset").glob("part-*"), *(out / "ledger").rglob("00000001.parquet")]:
        path.unlink()
    summary = run(spec)
    assert (summary.exit_code, summary.generated) == (0, 2)
    assert read_dataset(str(out)) == whole
    assert verify(str(out)).defects == ()


def test_a_model_that_cannot_be_loaded_is_one_line(manifest: Manifest, tiny_model: Path, tmp_path: Path) -> None:
    def broken(plan: Plan, device: str) -> FakeEngine:
        raise EngineError("unet/diffusion_pytorch_model.safetensors: key conv_in.weight is missing; fetch it again")

    with pytest.raises(JobError, match=r"conv_in\.weight is missing"):
        run(job_spec(tiny_model, manifest(2), tmp_path / "out"), engine_factory=broken)


def test_what_takes_time_before_the_first_picture_is_named(tiny_model, manifest, tmp_path):
    stages: list[str] = []
    run_job(job_spec(tiny_model, manifest(2), tmp_path / "out"), on_stage=stages.append)
    assert stages == [
        "reading the manifest",
        "finding and hashing the model",
        "opening the output",
        "loading the model",
    ]


def slow_chunk_engine(plan: Plan, device: str) -> FakeEngine:
    return FakeEngine(batch_size=plan.batch_size, pause=20.0)


def _run_and_note(spec: JobSpec, folder: Path) -> None:
    with (folder / "log").open("w") as log, contextlib.redirect_stdout(log):
        summary = run(spec, engine_factory=slow_chunk_engine, on_stop=(folder / "stopping").touch)
    sys.exit(summary.exit_code)


def test_a_second_signal_ends_the_run_before_its_chunk_is_committed_and_it_resumes(
    manifest: Manifest, tiny_model: Path, tmp_path: Path
) -> None:
    spec = job_spec(tiny_model, manifest(3), tmp_path / "out")
    process = PROCESSES.Process(target=_run_and_note, args=(spec, tmp_path))
    process.start()
    assert process.pid is not None
    _wait_for(lambda: "begin" in _text(tmp_path / "log"))
    os.kill(process.pid, signal.SIGINT)
    _wait_for((tmp_path / "stopping").exists)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert not list(Storage.open(spec.out).list("ledger"))
    summary = run(spec)
    assert (summary.exit_code, summary.generated) == (0, 3)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
