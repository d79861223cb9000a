"""What results add to the figures of a run, by a sink that keeps them, as a node of Ray would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from latentmill.jobs.chunk_result import ChunkResult
from latentmill.jobs.executors import metrics
from latentmill.jobs.executors.inline import InlineExecutor
from latentmill.jobs.executors.metrics import METRICS, RunMetrics
from latentmill.jobs.executors.ray_metrics import output_label
from latentmill.jobs.job import open_job
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.stages import STAGES
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import fake_engine
from tests.jobs.outputs.repairs import healed_engine


class Kept:
    """Takes what Ray takes: known names of the right kind, their very labels, and counters that rise."""

    def __init__(self) -> None:
        self.values: Counter[tuple[str, ...]] = Counter()

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        assert value > 0
        self._check("counter", name, labels)
        self.values[(name, *labels.values())] += value

    def put(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._check("gauge", name, labels)
        self.values[(name, *labels.values())] = value

    def _check(self, kind: str, name: str, labels: Mapping[str, str]) -> None:
        assert METRICS[name].kind == kind
        assert METRICS[name].labels == tuple(labels)

    def of(self, name: str) -> dict:
        """The values of a metric by its first label."""
        found: Counter[str] = Counter()
        for (each, *labels), value in self.values.items():
            if each == f"latentmill_{name}":
                found[labels[0] if labels else ""] += value
        return dict(found)


MIXED = ["a circle", "some nsfw", "some poison", "a square", "a star", "a line", "more nsfw"]


@pytest.fixture
def spec(tiny_model, manifest, tmp_path):
    return job_spec(tiny_model, manifest(MIXED), tmp_path / "out")


def measured(spec, *, repair: bool = False, engine=fake_engine) -> Kept:
    """The figures of one run over all chunks."""
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))
    job, kept = open_job(spec.out), Kept()
    figures = RunMetrics(kept)
    figures.begin(job.plan.n_samples, repair=repair)
    for result in InlineExecutor(job, engine_factory=engine).run(range(job.plan.n_chunks), repair=repair):
        figures.add(result)
    return kept


def test_a_run_counts_the_rows_that_it_commits_and_a_second_one_none(spec):
    first = measured(spec)
    assert first.of("images_total") == run(spec).counts == {"ok": 4, "flagged": 2, "failed": 1}
    assert first.of("chunks_total") == {"committed": 4}
    assert first.of("images_left") == {"": 0}
    assert first.of("stage_seconds_total").keys() == STAGES.keys() - {"reuse"}
    again = measured(spec)
    assert again.of("images_total") == again.of("stage_seconds_total") == {}
    assert again.of("chunks_total") == {"already": 4}


def test_a_repair_counts_what_it_repaired_and_not_what_failed_again(spec):
    measured(spec)
    failing = measured(spec, repair=True)
    assert failing.of("images_total") == {}
    assert failing.of("chunks_total") == {"already": 3, "unrepaired": 1}
    healing = measured(spec, repair=True, engine=healed_engine)
    assert healing.of("images_total") == {"ok": 1}
    assert healing.of("images_left") == {"": 0}


def test_what_was_reused_is_counted_by_itself_too():
    kept = Kept()
    RunMetrics(kept).add(ChunkResult(chunk=0, outcome="committed", ok=2, reused=2, actor="host:1"))
    assert kept.of("images_total") == {"ok": 2}
    assert kept.of("images_reused_total") == {"": 2}


def test_work_that_another_driver_had_first_is_time_but_no_pictures():
    kept = Kept()
    figures = RunMetrics(kept)
    figures.begin(4, repair=False)
    figures.add(ChunkResult(chunk=0, outcome="error", error="the store is away", actor="a:1"))
    assert kept.of("images_left") == {"": 4}
    figures.add(ChunkResult(chunk=0, outcome="lost", ok=2, actor="a:1", stages={"sample": 3.0, "check": 1.0}))
    assert kept.of("images_left") == {"": 2}
    assert kept.of("images_total") == {}
    assert kept.of("chunks_total") == {"error": 1, "lost": 1}
    assert kept.values["latentmill_stage_seconds_total", "sample", "a"] == 3


def test_how_things_stand_is_told_by_host_and_deaths_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    kept = Kept()
    figures = RunMetrics(kept, {"n1": "one", "n2": "two", "n3": "two"}.__getitem__)
    figures.look(workers=["n1", "n2", "n3", "n3"], deaths={}, queued=9, in_flight=4)
    assert kept.of("workers") == {"one": 1, "two": 3}
    figures.look(workers=["n1", "n2", "n3", "n3"], deaths={"n1": 1}, queued=0, in_flight=0)
    assert kept.of("chunks_queued") == {"": 9}, "it was told a moment ago"
    now[0] += 1
    figures.look(workers=["n2"], deaths={"n1": 1, "n3": 2}, queued=8, in_flight=3)
    assert kept.of("workers") == {"one": 0, "two": 1}
    assert kept.of("worker_seconds_total") == {"one": 1, "two": 3}
    assert kept.of("worker_deaths_total") == {"one": 1, "two": 2}
    now[0] += 0.5
    figures.end({"n1": 2, "n3": 2})
    assert kept.of("worker_seconds_total") == {"one": 1, "two": 3.5}
    assert kept.of("worker_deaths_total") == {"one": 2, "two": 2}
    assert kept.of("workers") == {"one": 0, "two": 0}
    assert kept.of("chunks_queued") == kept.of("chunks_in_flight") == {"": 0}


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("s3://key:secret@bucket/private/birds/?x=1", "birds-0a1b2c3d"),
        ("/data/birds", "birds-0a1b2c3d"),
        ("memory://" + "long" * 40, "long" * 16 + "-0a1b2c3d"),
    ],
)
def test_an_output_is_named_without_its_place(url: str, label: str):
    assert output_label(url, "0a1b2c3d4e5f") == label
