"""Plans whose prompts are templates, come from an axis, or have texts replaced."""

from __future__ import annotations

import json

import pytest

from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.job_file import resolve
from latentmill.jobs.plans import snapshot
from latentmill.jobs.plans.plan import adopt, draft_plan, load_plan
from latentmill.jobs.plans.planned import PLAN_PATH, canonical, fingerprint
from latentmill.jobs.store.storage import Storage


@pytest.fixture
def spec_of(tmp_path, tiny_model):
    """A function from prompts and flags to a spec."""
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "colour.txt").write_text("red\nblue\ngreen\n")

    def make(prompts, **flags):
        path = tmp_path / "prompts.jsonl"
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return resolve(None, {"prompts": [str(path)], "out": str(tmp_path / "out"), "model": str(tiny_model), **flags})

    return make


def planned(spec):
    with draft_plan(spec) as draft:
        return adopt(draft, Storage.open(spec.out))


def samples_of(plan):
    samples = [sample for chunk in range(plan.n_chunks) for sample in plan.samples_of_chunk(chunk)]
    return sorted(samples, key=lambda sample: sample.ordinal)


def test_all_prompts_of_templates_are_samples_in_order_with_the_rows_seeds(spec_of, monkeypatch):
    monkeypatch.setattr(snapshot, "PART_ROWS", 2)
    rows = [{"prompt": "{a|b} {c|d}", "seed": 7, "num_images": 2}, "plain", "{2$$x|y}", {"prompt": "{p|q}", "seed": 1}]
    plan = planned(spec_of(rows, template="dynamic-all", sweep=["guidance_scale=2,3"], chunk_size=5))
    samples = samples_of(plan)
    first = [(sample.request.prompt, sample.request.seed) for sample in samples[:16]]
    assert first == [(text, seed) for text in ("a c", "a d", "b c", "b d") for seed in (7, 8)] * 2
    assert [sample.request.prompt for sample in samples[16:]] == [
        "plain", "plain", "x, y", "y, x", "x, y", "y, x", "p", "q", "p", "q",
    ]  # fmt: skip
    assert [sample.request.seed for sample in samples[16:22]] == list(range(42 + 16, 42 + 22))
    assert [sample.request.seed for sample in samples[22:]] == [1] * 4
    assert {sample.extra["prompt_template"] for sample in samples[:16]} == {"{a|b} {c|d}"}
    assert plan.record_schema.field("prompt_template").type == "string"
    assert list(plan.images_per_row()) == [8, 1, 2, 2]


def test_a_template_is_drawn_by_each_samples_seed_and_stays_so_on_resume(spec_of):
    spec = spec_of(
        [{"prompt": "{a|b|c|d|e} {f|g|h}", "seed": 3}] * 2,
        template="dynamic",
        sweep=["guidance_scale=2,3"],
        num_images=20,
    )
    plan = planned(spec)
    samples = samples_of(plan)
    by_seed = {sample.request.seed: sample.request.prompt for sample in samples}
    assert all(by_seed[sample.request.seed] == sample.request.prompt for sample in samples)
    assert len(by_seed) == 20
    assert len(set(by_seed.values())) > 5
    again = samples_of(load_plan(Storage.open(spec.out)))
    assert [sample.request for sample in again] == [sample.request for sample in samples]


def test_a_plan_keeps_its_wildcards_and_another_folder_is_another_plan(spec_of, tmp_path):
    cards = tmp_path / "cards"
    (cards / "unused.txt").write_text("x\n")
    spec = spec_of(["a __colour__ dot"], template="dynamic-all", wildcards=str(cards))
    planned(spec)
    (cards / "unused.txt").write_text("y\n")
    planned(spec)  # what is not used does not count
    (cards / "colour.txt").write_text("red\nblue\npink\n")
    with pytest.raises(OutputConflictError, match=r"wildcards \(digest\)"):
        planned(spec)
    (cards / "colour.txt").unlink()
    prompts = [sample.request.prompt for sample in samples_of(load_plan(Storage.open(spec.out)))]
    assert prompts == ["a red dot", "a blue dot", "a green dot"]
    (kept,) = (tmp_path / "out" / "_job").glob("wildcards-*.json")
    kept.write_text(kept.read_text().replace("red", "rad"))
    with pytest.raises(JobError, match="wildcards are not what was planned"):
        samples_of(load_plan(Storage.open(spec.out)))


def test_a_row_whose_template_is_bad_or_too_large_is_rejected_alone(spec_of, tmp_path):
    cards = tmp_path / "cards"
    (cards / "long.txt").write_text("x" * 9_000)
    rows = ["{a|b", "{a|b}" * 30, "__nothing__", "__long____long__", "{fine|good}"]
    with draft_plan(spec_of(rows, template="dynamic-all", wildcards=str(cards))) as draft:
        summary = draft.summary()
    assert (summary.rows, summary.rejected_rows, summary.samples) == (1, 4, 2)
    reasons = [note.reason for note in summary.first_rejects]
    assert "never closed" in reasons[0]
    assert "stands for 1,073,741,824 prompts, the limit is 1,000,000" in reasons[1]
    assert "has no nothing.txt" in reasons[2]
    assert "can become 18,000 bytes long, the limit is 16,384" in reasons[3]
    with draft_plan(spec_of(["{a|b}" * 30], template="dynamic")) as draft:
        assert draft.summary().samples == 1


def test_too_many_samples_are_refused_with_the_number_and_the_limit(spec_of):
    rows = ["{a|b}" * 19] * 30
    with pytest.raises(UsageError, match=r"15,728,640,000 samples, the limit is 10,000,000,000"):
        draft_plan(spec_of(rows, template="dynamic-all", sweep=["seed=0:1000"]))


def test_a_prompt_axis_takes_the_place_of_the_rows_prompts_and_needs_none(spec_of, tmp_path, tiny_model):
    axis = tmp_path / "axis.txt"
    axis.write_text("a {red|blue} dot\na cat\n")
    flags = {"out": str(tmp_path / "out"), "model": str(tiny_model), "sweep": [f"prompt=@{axis}", "seed=0:2"]}
    plan = planned(resolve(None, flags | {"template": "dynamic-all"}))
    assert [(sample.request.prompt, sample.request.seed) for sample in samples_of(plan)] == [
        (prompt, seed) for prompt in ("a red dot", "a blue dot", "a cat") for seed in (0, 1)
    ]
    with draft_plan(spec_of(["{broken", "x"], sweep=[f"prompt=@{axis}"], template="dynamic")) as draft:
        assert draft.summary().samples == 4


def test_replaced_texts_are_columns_and_rows_without_them_are_named(spec_of):
    rows = [{"prompt": "a red dot", "prompt.s/red/": "own"}, "a redder line", "a blue dot"]
    spec = spec_of(rows, sweep=["prompt.s/red/{red,dark red,}", "negative_prompt.s/bad/{x,y}"], negative_prompt="bad b")
    with draft_plan(spec) as draft:
        assert draft.notes == (
            "1 of 3 prompts lack the text that the axis prompt.s/red/ replaces: its values change nothing there",
        )
        plan = adopt(draft, Storage.open(spec.out))
    samples = samples_of(plan)
    assert [sample.request.prompt for sample in samples[:6:2]] == ["a red dot", "a dark red dot", "a  dot"]
    assert [sample.request.negative_prompt for sample in samples[:2]] == ["x b", "y b"]
    assert samples[2].extra["prompt.s/red/"] == "dark red"
    assert samples[2].extra["manifest_prompt.s/red/"] == "own"
    assert samples[8].request.prompt == "a dark redder line"


def test_a_prompt_that_replacements_make_too_long_is_rejected(spec_of):
    with draft_plan(spec_of(["a" * 5_000, "a"], sweep=["prompt.s/a/{b,long}/"])) as draft:
        (note,) = draft.summary().first_rejects
    assert "can have 20,000 bytes once texts in it are replaced, the limit is 16,384" in note.reason
    with pytest.raises(UsageError, match="negative_prompt can have 20,000 bytes"):
        draft_plan(spec_of(["a"], negative_prompt="a" * 5_000, sweep=["negative_prompt.s/a/{b,long}/"]))


def test_texts_that_look_like_another_programs_syntax_are_named(spec_of):
    rows = ["a {red|blue} dot", "{{masterpiece}}", "a <lyco:style:0.8> dot", "__colour__ dot", "a_b __init__ (x:1.2)"]
    rows.append("a <lora:style:0.8> dot")
    with draft_plan(spec_of(rows)) as draft:
        loras, first, second = draft.notes
    assert first.startswith("3 of 6 prompts look like templates")
    assert "--template dynamic" in first
    assert "'a {red|blue} dot'" in first
    assert loras.startswith("1 prompts have <lora:...>, which is read as text")
    assert second.startswith("1 of 6 prompts name a network")
    with draft_plan(spec_of(["a {red|blue} dot"], template="dynamic")) as draft:
        assert draft.notes == ()


def test_long_prompts_are_counted_by_what_templates_and_replacements_make_of_them(spec_of):
    words = " ".join(["dot"] * 100)
    for flags in ({"template": "dynamic"}, {"template": "dynamic-all"}):
        with draft_plan(spec_of([f"{{a|{words}}}", "{a|b}"], **flags)) as draft:
            assert draft.summary().tokens_over_limit == 1
        with draft_plan(spec_of([f"{{a|{words}}}", "{a|b}"], long_prompts="error", **flags)) as draft:
            assert draft.summary().rejected_rows == 1
    with draft_plan(spec_of(["a red dot"], sweep={"prompt.s/red/": ["blue", words]})) as draft:
        assert draft.summary().tokens_over_limit == 1
    with pytest.raises(UsageError, match="sweep axis prompt: prompt has"):
        draft_plan(spec_of(["a"], sweep={"prompt": ["b", words]}, long_prompts="error"))


def test_zipped_samplers_and_steps_need_to_go_together_only_where_they_meet(spec_of):
    sweep = ["sampler=ddim,euler", "eta=0.5,0"]
    with pytest.raises(UsageError, match=r"eta 0\.5 does not go with sampler euler"):
        draft_plan(spec_of(["a"], sweep=sweep))
    with draft_plan(spec_of(["a"], sweep=sweep, zip=["sampler,eta"])) as draft:
        summary = draft.summary()
    assert (summary.samples, summary.zips) == (2, (("sampler", "eta"),))
    with draft_plan(spec_of(["a"], sweep=["width=128,512", "height=512,128"], zip=["width,height"])) as draft:
        assert draft.summary().samples == 2
    with pytest.raises(UsageError, match="128x128 is too small for the watermark"):
        draft_plan(spec_of(["a"], sweep=["width=128,512", "height=512,128"]))


def test_another_zip_is_another_plan(spec_of):
    sweep = ["seed=0:2", "guidance_scale=2,3"]
    planned(spec_of(["a"], sweep=sweep, zip=["seed,guidance-scale"]))
    planned(spec_of(["a"], sweep=sweep, zip=["guidance_scale,seed"]))
    with pytest.raises(OutputConflictError, match="zip: 'seed,guidance_scale' -> 'absent'"):
        planned(spec_of(["a"], sweep=sweep))


def test_an_output_begun_before_there_was_a_setting_is_gone_on_with_at_its_default(spec_of):
    spec = spec_of(["{a|b}", "c"])
    planned(spec)
    storage = Storage.open(spec.out)
    document = json.loads(storage.read(PLAN_PATH))
    del document["checksum"], document["identity"]["template"]
    document["plan_hash"] = fingerprint(document["identity"])
    storage.write(PLAN_PATH, canonical({**document, "checksum": fingerprint(document)}).encode())
    plan = planned(spec)
    assert plan.plan_hash == document["plan_hash"]
    assert [sample.request.prompt for sample in samples_of(plan)] == ["{a|b}", "c"]
    with pytest.raises(OutputConflictError, match="template: 'absent' -> 'dynamic'"):
        planned(spec_of(["{a|b}", "c"], template="dynamic"))
