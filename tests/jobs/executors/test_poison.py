"""On a real cluster: prompts that kill or hang their worker, and interrupts."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from latentmill.jobs.code import own_code
from latentmill.jobs.errors import JobError
from latentmill.jobs.executors import ray_pool
from latentmill.jobs.executors.isolation import DIED, OVERRAN
from latentmill.jobs.executors.ray_cluster import connect
from latentmill.jobs.executors.ray_entry import MODEL, THREADS, WorkerProcess, send_by_value
from latentmill.jobs.job import Reuse, open_job
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.progress import Progress
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, pictures, read_dataset, run
from tests.jobs.fakes import FakeEngine, fake_engine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray 2.60 uses its own old settings
]


FROZEN = "LATENTMILL_TEST_FROZEN"


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One Ray session for all tests of this file, whose engines may freeze once."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setenv(FROZEN, f"{folder}/frozen")
        connection = connect(None)
        yield
        connection.close()


def test_prompts_that_kill_hang_or_raise_fail_alone(manifest, tiny_model: Path, tmp_path: Path):
    prompts = [f"picture {number}" for number in range(16)]
    settings = {"chunk_size": 4, "batch_size": 2, "executor": "ray", "chunk_timeout": 2}
    prompts[5], prompts[10], prompts[11] = "segfault", "hang", "crash"
    summary = run(job_spec(tiny_model, manifest(prompts), tmp_path / "out", **settings))
    assert (summary.exit_code, summary.counts) == (1, {"ok": 13, "flagged": 0, "failed": 3})
    rows = {row["prompt"]: row for row in read_dataset(str(tmp_path / "out")).rows.to_pylist()}
    errors = {prompt: row["error"] for prompt, row in rows.items() if row["error"]}
    assert errors == {"segfault": DIED, "hang": OVERRAN, "crash": "RuntimeError: this prompt raises"}
    calm = [prompt if prompt.startswith("picture") else "calm" for prompt in prompts]
    run(job_spec(tiny_model, manifest(calm), tmp_path / "calm", chunk_size=4, batch_size=2))
    for row in read_dataset(str(tmp_path / "calm")).rows.to_pylist():
        if row["prompt"] != "calm":
            assert rows[row["prompt"]] == row
    assert verify(str(tmp_path / "out")).defects == ()


@pytest.fixture
def hanging(manifest, tiny_model: Path, tmp_path: Path) -> tuple[str, str]:
    """The place of a job whose one chunk hangs, with Python's lock held: its output, and its plan's hash."""
    spec = job_spec(tiny_model, manifest(["hang"]), tmp_path / "out")
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))
    return spec.out, open_job(spec.out).plan.plan_hash


def ends_itself(actor, call) -> bool:
    """Whether the process of an actor ends in a call, with nobody there to end it."""
    import ray

    try:
        ray.get(call(), timeout=60)
    except ray.exceptions.ActorDiedError:
        return True
    except ray.exceptions.GetTimeoutError:
        ray.kill(actor)
    return False


@pytest.fixture
def actor(hanging: tuple[str, str]) -> Any:
    """A process with that job's engine loaded."""
    import ray

    send_by_value()
    actor = ray.remote(concurrency_groups=THREADS)(WorkerProcess).options(num_cpus=0).remote(own_code())
    arguments = pickle.dumps(((*hanging, Reuse()), fake_engine))
    assert ray.get(actor.load.remote(arguments, 0)) == (None, "fake", "")
    return actor


def test_in_the_pool_a_process_past_its_deadline_ends_itself(actor):
    assert ends_itself(actor, lambda: actor.sample.options(concurrency_group=MODEL).remote(0, 1.0, repair=False))


def test_isolated_a_process_past_its_deadline_ends_itself(actor):
    assert ends_itself(actor, lambda: actor.alone.remote("chunk", 1.0, 0, repair=False))


def dawdling_engine(plan, device) -> FakeEngine:
    return FakeEngine(batch_size=plan.batch_size, pause=0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_chunks_in_flight_and_starts_no_more(
    number: signal.Signals, manifest, tiny_model: Path, tmp_path: Path
):
    out = str(tmp_path / "out")
    spec = job_spec(tiny_model, manifest(200), out, executor="ray")
    told: list[float] = []

    def interrupt(progress: Progress) -> None:
        if progress.phase == "generating" and not told:
            told.append(time.monotonic())
            os.kill(os.getpid(), number)

    summary = run(spec, on_progress=interrupt, engine_factory=dawdling_engine)
    took = time.monotonic() - told[0]
    records = [path for path, _ in Storage.open(out).list("ledger")]
    attempts = {path.split("/")[2] for path, _ in pictures(Storage.open(out))}
    assert summary.exit_code == 130
    assert 2 <= len(records) < 20
    assert len(attempts) == len(records), "a chunk in flight was thrown away"
    assert took < 10


def stillborn_engine(plan, device) -> FakeEngine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


def test_a_node_where_no_worker_survives_its_start_ends_the_run_in_one_line(manifest, tiny_model, tmp_path):
    spec = job_spec(tiny_model, manifest(4), tmp_path / "out", executor="ray")
    words = r"^no node can work: a worker process died 3 times in a row while it loaded the model; [^\n]*$"
    with pytest.raises(JobError, match=words):
        run(spec, engine_factory=stillborn_engine)


def freezing_engine(plan, device) -> FakeEngine:
    return FreezingEngine(batch_size=plan.batch_size)


class FreezingEngine(FakeEngine):
    """Stops its own process in the middle of a chunk, once: no deadline of its own can end it then."""

    def generate(self, requests):
        try:
            Path(os.environ[FROZEN]).touch(exist_ok=False)
        except FileExistsError:
            return super().generate(requests)
        os.kill(os.getpid(), signal.SIGSTOP)
        return []


def test_a_worker_that_is_stopped_is_killed_after_its_deadline_and_its_chunk_made_by_another(
    manifest, tiny_model, monkeypatch, tmp_path
):
    monkeypatch.setattr(ray_pool, "GRACE_SECONDS", 1.0)
    spec = job_spec(tiny_model, manifest(12), tmp_path / "out", executor="ray", chunk_timeout=5)
    summary = run(spec, engine_factory=freezing_engine)
    assert Path(os.environ[FROZEN]).exists()
    assert (summary.exit_code, summary.counts) == (0, {"ok": 12, "flagged": 0, "failed": 0})
