"""Real Ray: a cluster of its own for the kill test, one shared by the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.executors.ray_cluster import connect
from latentmill.jobs.progress import Progress
from latentmill.jobs.runner import run_job
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import broken_engine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray 2.60 uses its own old settings
]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "ray://127.0.0.1:10001", "6379"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address: str):
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"no Ray cluster answers at .*check --address"):
        connect(address)
    assert time.monotonic() - began < 30


def test_a_killed_actor_changes_nothing(tiny_model: Path, manifest, tmp_path: Path):
    """SIGKILL of one of two models in the middle: the dataset is bit by bit the one of an undisturbed inline run."""
    settings = {"num_inference_steps": 40, "threads_per_actor": 1, "safety": "none"}
    prompts = manifest(40)
    calm, rough = str(tmp_path / "calm"), str(tmp_path / "rough")
    assert run_job(job_spec(tiny_model, prompts, calm, **settings)).exit_code == 0
    killer = Killer(rough)
    killer.start()
    summary = run_job(job_spec(tiny_model, prompts, rough, **settings, executor="ray"))
    killer.join()
    assert killer.victim is not None
    assert killer.committed_then < 20
    assert (summary.exit_code, summary.counts) == (0, {"ok": 40, "flagged": 0, "failed": 0})
    assert read_dataset(rough) == read_dataset(calm)
    assert not list(Path("/tmp").glob(f"lm-*/r/session_*_{os.getpid()}"))


class Killer(threading.Thread):
    """Waits until two models are at work, then kills one of their processes."""

    def __init__(self, out: str) -> None:
        super().__init__(daemon=True)
        self.victim: int | None = None
        self.committed_then = -1
        self._out = Storage.open(out)

    def run(self) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            pids = actor_pids()
            if len(pids) == 2:
                time.sleep(0.3)
                self.committed_then = len(list(self._out.list("ledger")))
                self.victim = pids[0]
                os.kill(self.victim, signal.SIGKILL)
                return
            time.sleep(0.1)


def actor_pids() -> list[int]:
    import ray
    from ray._private.state import actors

    if not ray.is_initialized():
        return []
    return [
        actor["Pid"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and "WorkerProcess" in actor["ActorClassName"]
    ]


@pytest.fixture(scope="module")
def session(s3_environment: dict[str, str]) -> Iterator[None]:
    """One Ray session for several tests, started by the executor's own code, with the S3 server's credentials."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        connection = connect(None)
        yield
        connection.close()


def test_poison_is_data_and_the_session_of_others_is_left_alone(session, tiny_model: Path, manifest, tmp_path: Path):
    import ray

    prompts = manifest(["a", "poison", "nsfw", "b", "c", "d"])
    spec = job_spec(tiny_model, prompts, tmp_path / "out", executor="ray")
    summary = run(spec)
    assert summary.counts == {"ok": 4, "flagged": 1, "failed": 1}
    assert summary.exit_code == 1
    assert summary.executor.startswith("Ray (the session of this process), 2 actors")
    assert ray.is_initialized()
    run(job_spec(tiny_model, prompts, tmp_path / "inline"))
    assert read_dataset(str(tmp_path / "out")) == read_dataset(str(tmp_path / "inline"))


def test_a_device_that_breaks_ends_the_pass_early_and_is_told(session, tiny_model, manifest, tmp_path):
    spec = job_spec(tiny_model, manifest(80), tmp_path / "out", executor="ray")
    with pytest.raises(JobError, match=r"no node can work: 12 failures in a row.*RuntimeError: the device is lost"):
        run(spec, engine_factory=broken_engine)
    assert not list(Storage.open(str(tmp_path / "out")).list("ledger"))


def test_a_job_on_s3_resumes_and_generates_nothing_twice(session, s3: str, tiny_model: Path, manifest):
    spec = job_spec(tiny_model, manifest(6), s3, executor="ray")
    first = run(spec)
    assert (first.exit_code, first.generated) == (0, 6)
    storage = Storage.open(s3)
    storage.delete("_job/dataset.json")
    record, _ = next(storage.list("ledger"))
    storage.delete(record)
    again = run(spec)
    assert (again.exit_code, again.generated) == (0, 2)


def test_actors_take_what_another_output_holds(session, s3: str, tiny_model: Path, manifest, tmp_path: Path):
    """From a bucket into a folder, and on from the folder as links: each row names where its picture was."""
    prompts, sweep = manifest(5), {"guidance_scale": [3, 5], "seed": [7]}
    run(job_spec(tiny_model, prompts, s3, sweep=sweep))
    alone = job_spec(tiny_model, prompts, tmp_path / "alone", sweep={"guidance_scale": [5, 7], "seed": [7]})
    run(alone)
    taken = job_spec(tiny_model, prompts, tmp_path / "taken", sweep=dict(alone.sweep), executor="ray", reuse=[s3])
    summary = run(taken)
    assert (summary.exit_code, summary.reused, summary.generated) == (0, 5, 5)
    linked = replace(taken, out=str(tmp_path / "linked"))
    linked = replace(linked, runtime=replace(taken.runtime, reuse=(taken.out,), reuse_by="link"))
    assert (run(linked).reused, run(linked).reused) == (10, 0)
    for out in (taken.out, linked.out):
        dataset, undisturbed = read_dataset(out), read_dataset(alone.out)
        assert dataset.files == undisturbed.files
        columns = [name for name in dataset.rows.column_names if name != "reused_from"]
        assert dataset.rows.select(columns).equals(undisturbed.rows.select(columns))
    names = read_dataset(taken.out).rows.column("reused_from").drop_null().to_pylist()
    assert [name.startswith(f"{s3}/images/") for name in names] == [True] * 5


def test_leaving_early_stops_the_work(session, tiny_model: Path, manifest, tmp_path: Path):
    from latentmill.jobs.plans.plan import load_plan

    out = str(tmp_path / "out")
    spec = job_spec(tiny_model, manifest(200), out, executor="ray")
    seen: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress)
        if progress.phase == "generating":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    summary = run(spec, on_progress=interrupt)
    assert summary.exit_code == 130
    assert 0 < len(list(Storage.open(out).list("ledger"))) < load_plan(Storage.open(out)).n_chunks
