"""What a plan says of its manifest: parameters from rows, misspelled columns, shared ids, the sample."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job_file import SAMPLE_MANIFEST, resolve
from latentmill.jobs.plans.ids import IdCounter
from latentmill.jobs.plans.plan import draft_plan


@pytest.fixture
def draft(tmp_path, tiny_model):
    """A function from a manifest's text and flags to the draft's summary."""

    def make(text, *, suffix="csv", **flags):
        (tmp_path / f"m.{suffix}").write_text(text)
        flags = {
            "prompts": [str(tmp_path / f"m.{suffix}")],
            "model": str(tiny_model),
            "out": str(tmp_path / "o"),
            **flags,
        }
        with draft_plan(resolve(None, flags)) as drafted:
            return drafted.summary()

    return make


def test_a_misspelled_column_is_said_and_refused_by_strict(draft):
    text = "prompt,sede,stpes,mood\na,1,2,x\n"
    plan = draft(text)
    assert len(plan.notes) == 2
    assert "column 'sede'" in plan.notes[0]
    assert "close to seed" in plan.notes[0]
    assert "close to num_inference_steps" in plan.notes[1]
    assert plan.carried_columns == ("sede", "stpes", "mood")
    with pytest.raises(UsageError, match=r"'sede'.*strict refuses such columns"):
        draft(text, strict=True)
    assert draft("prompt,mood\na,x\n", strict=True).notes == ()


def test_accepted_aliases_make_the_very_plan_of_the_right_names(draft):
    right = draft("prompt,num_inference_steps,guidance_scale\na,3,2\n")
    text = "prompt,steps,cfg\na,3,2\n"
    assert "say --accept-aliases" in draft(text).notes[0]
    accepted = draft(text, accept_aliases=True, strict=True)
    assert accepted.plan_hash == right.plan_hash != draft(text).plan_hash
    assert accepted.notes == ()
    beside = draft("prompt,cfg,guidance_scale\na,3,2\n")
    assert "which the file has too" in beside.notes[0]


def test_parameters_of_rows_are_told_from_defaults_and_axes(draft):
    plan = draft("prompt,seed,guidance_scale\na,1,2\n", sweep=["guidance_scale=1,2"])
    assert plan.row_parameters == ("seed",)


def test_shared_ids_are_counted_and_allowed(draft):
    plan = draft("prompt,id\na,x\nb,x\nc,y\nd,x\n")
    assert (plan.rows, plan.duplicate_ids, plan.ids_compared) == (4, 2, 4)
    assert plan.notes == ("duplicate ids: 2 of 4 rows have the id of an earlier one; each is drawn anyway",)
    assert draft("prompt,id\na,x\nb,y\n").notes == ()
    assert draft("prompt\na\na\n").notes == ()


def test_ids_are_compared_up_to_a_limit_of_memory():
    ids = IdCounter(limit=10)
    for start in (0, 6, 12):
        ids.add(pa.array([f"id {number % 8}" for number in range(start, start + 6)]))
    assert (ids.compared, ids.duplicates()) == (10, 2)
    assert sum(map(len, ids._hashes)) == 10
    assert ids._hashes[0].dtype == np.int64


def test_nan_and_numbers_of_thousands_of_digits_are_rejected_rows(draft):
    lines = [
        '{"prompt": "fine", "seed": 1}',
        '{"prompt": "b", "seed": NaN}',
        '{"prompt": "c", "seed": Infinity}',
        '{"prompt": "d", "seed": 1e400}',
        '{"prompt": "e", "seed": ' + "9" * 4_000 + "}",
        '{"prompt": "f", "seed": ' + "9" * 5_000 + "}",
        '{"prompt": "g", "guidance_scale": NaN}',
        '{"prompt": "h", "id": ' + "9" * 4_000 + "}",
        '{"prompt": "i", "tag": NaN}',
    ]
    plan = draft("\n".join(lines), suffix="jsonl")
    assert (plan.rows, plan.rejected_rows) == (2, 7)
    assert [note.source_row for note in plan.first_rejects] == [2, 3, 4, 5, 6, 7, 8]
    assert "seed nan is outside" in plan.first_rejects[0].reason
    assert "more than 60 digits" in plan.first_rejects[3].reason
    assert "id of more than 60 digits" in plan.first_rejects[6].reason
    assert all("\n" not in note.reason for note in plan.first_rejects)


def test_without_prompts_the_sample_of_the_package_is_drawn_and_said(tiny_model, tmp_path):
    spec = resolve(None, {"model": str(tiny_model), "out": str(tmp_path)}, or_sample=True)
    assert spec.prompts == (str(SAMPLE_MANIFEST),)
    with draft_plan(spec) as drafted:
        (note,) = drafted.notes
    assert "sample prompts" in note
    named = resolve(None, {"prompts": [str(SAMPLE_MANIFEST)], "model": str(tiny_model)}, or_sample=True)
    with draft_plan(named) as drafted:
        assert drafted.notes == (), "who names it knows"
    (tmp_path / "job.yaml").write_text(json.dumps({"seed": 1}))
    with pytest.raises(UsageError, match="no manifest is named"):
        resolve(str(tmp_path / "job.yaml"), {}, or_sample=True)
    with pytest.raises(UsageError, match="no manifest is named"):
        resolve(None, {})
