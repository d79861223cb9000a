"""How long a plan says that a run takes: measured, or by the records of an earlier output."""

from __future__ import annotations

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.estimate import with_estimate
from latentmill.jobs.job import open_job
from latentmill.jobs.plans.planning import draft_plan
from latentmill.jobs.runner import run_job
from tests.jobs.driver import job_spec


def estimate(spec, *, measure=False, rate_from=None, price=None):
    with draft_plan(spec) as draft:
        return with_estimate(draft, draft.summary(), measure=measure, rate_from=rate_from, price=price).estimate


@pytest.fixture
def small(tiny_model, manifest, tmp_path):
    """A function from flags to a spec of a small job without a watermark."""
    path = manifest(4)

    def make(out="out", **flags):
        settings = {"width": 64, "height": 64, "num_inference_steps": 2, "batch_size": 2, "chunk_size": 2} | flags
        return job_spec(tiny_model, path, tmp_path / out, watermark="none", safety="none", **settings)

    return make


def test_an_earlier_output_gives_the_rate_of_the_work_that_its_records_took(small):
    spec = small()
    run_job(spec)
    job = open_job(spec.out)
    taken = sum(float(job.ledger.read(chunk).metadata["generate_seconds"]) for chunk in range(2))
    same = estimate(small("new"), rate_from=spec.out)
    assert same.seconds == pytest.approx(taken)
    assert "out: " in same.source
    more = estimate(small("new", num_inference_steps=20, num_images=3, width=128), rate_from=spec.out, price=7200)
    assert more.seconds == pytest.approx(taken * 10 * 3 * 2)
    assert more.cost == pytest.approx(more.seconds * 2)
    unguided = estimate(small("new", guidance_scale=1), rate_from=spec.out)
    assert unguided.seconds == pytest.approx(taken / 2)


def test_a_measured_job_takes_longer_with_more_samples_and_shapes(small):
    one = estimate(small(), measure=True)
    many = estimate(small(sweep={"width": [64, 72, 80, 88], "seed": list(range(20))}), measure=True, price=1)
    assert 0 < one.seconds < many.seconds
    assert one.source.startswith("measured here: ")
    assert one.cost is None
    assert many.cost == pytest.approx(many.seconds / 3600)


def test_times_that_cannot_be_told_are_refused_in_one_line(small, tmp_path):
    run_of_nothing = small("empty")
    with draft_plan(run_of_nothing) as draft:
        from latentmill.jobs.plans.plan import adopt
        from latentmill.jobs.store.storage import Storage

        adopt(draft, Storage.open(run_of_nothing.out))
    for flags, words in (
        ({"price": 3.0}, "--gpu-hour-price needs the time"),
        ({"price": -1.0, "measure": True}, "is no price"),
        ({"measure": True, "rate_from": "x"}, "give one of them"),
        ({"rate_from": str(tmp_path / "nowhere")}, "has no plan"),
        ({"rate_from": run_of_nothing.out}, "no chunk whose time is known"),
    ):
        with pytest.raises(UsageError, match=words):
            estimate(small("new"), **flags)
