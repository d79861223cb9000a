"""How long a chunk took in each stage: measured where it happens, kept in its record, read from old records too."""

from __future__ import annotations

import json
import time

import pytest

from latentmill.jobs.executors.chunk_runner import ChunkRunner
from latentmill.jobs.job import open_job
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.runner import run_job
from latentmill.jobs.stages import STAGES, StageClock, stages_of, work_seconds
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec
from tests.jobs.fakes import fake_engine, slow_engine


@pytest.fixture
def runner(tiny_model, manifest, tmp_path):
    """Two chunks, and an engine that takes a tenth of a second to load, and for each of them."""
    spec = job_spec(tiny_model, manifest(8), tmp_path / "out", chunk_size=4, batch_size=4)
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))

    def slow_to_load(plan, device):
        time.sleep(0.1)
        return slow_engine(plan, device)

    return ChunkRunner(open_job(spec.out), engine_factory=slow_to_load)


def test_a_chunk_tells_the_seconds_of_each_stage_and_the_first_one_those_of_the_loading(runner):
    began = time.perf_counter()
    first, second = runner.chunk(0), runner.chunk(1)
    passed = time.perf_counter() - began
    assert list(first.stages) == [stage for stage in STAGES if stage != "reuse"]
    assert list(second.stages) == [stage for stage in STAGES if stage not in {"load", "reuse"}]
    assert first.stages["load"] >= 0.1
    assert all(result.stages["sample"] >= 0.1 for result in (first, second))
    assert all(seconds > 0 for seconds in second.stages.values())
    assert work_seconds(first.stages) + work_seconds(second.stages) <= passed
    assert runner.chunk(1).stages == {}  # it is committed: nothing is done


def test_a_record_keeps_the_seconds_of_the_stages_before_its_own_commit(runner, tmp_path):
    results = [runner.chunk(chunk) for chunk in (0, 1)]
    ledger = open_job(str(tmp_path / "out")).ledger
    for chunk, result in enumerate(results):
        metadata = ledger.read(chunk).metadata
        before = {stage: seconds for stage, seconds in result.stages.items() if stage != "commit"}
        assert stages_of(metadata) == pytest.approx(before, abs=1e-4)
        assert float(metadata["generate_seconds"]) == pytest.approx(result.stages["sample"], abs=1e-3)


def test_what_other_outputs_have_is_taken_in_a_stage_of_its_own(tiny_model, manifest, tmp_path):
    def spec(out, **flags):
        return job_spec(tiny_model, manifest(4), tmp_path / out, chunk_size=4, batch_size=4, **flags)

    run_job(spec("donor"), engine_factory=fake_engine)
    run_job(spec("out", reuse=(str(tmp_path / "donor"),)), engine_factory=slow_engine)
    found = stages_of(open_job(str(tmp_path / "out")).ledger.read(0).metadata)
    assert found["reuse"] > 0
    assert found["sample"] < 0.1  # the engine's pause: it was not asked


def test_a_clock_adds_up_also_what_raises():
    clock = StageClock()

    @clock.time("sample")
    def fail():
        time.sleep(0.01)
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    assert clock.seconds["sample"] >= 0.02
    assert stages_of(clock.details()) == pytest.approx(clock.seconds, abs=1e-4)


@pytest.mark.parametrize(
    ("metadata", "stages"),
    [
        ({"generate_seconds": "1.25"}, {"sample": 1.25}),
        ({}, {}),
        ({"generate_seconds": "much"}, {}),
        ({"stage_seconds": "{"}, {}),
        ({"stage_seconds": "[1]"}, {}),
        ({"stage_seconds": "7"}, {}),
        ({"stage_seconds": json.dumps({"sample": "x"})}, {}),
        ({"stage_seconds": json.dumps({"sample": 10**400})}, {}),
        ({"stage_seconds": '{"sample": NaN, "check": -1, "encode": 1, "write": Infinity, "other": 2}'}, {"encode": 1}),
    ],
)
def test_old_records_tell_what_they_have_and_strange_ones_nothing(metadata, stages):
    assert stages_of(metadata) == stages
