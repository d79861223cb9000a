"""Model as an axis: chunks of one model each, every model loaded once, and a broken one costs its own samples."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.executors.inline import InlineExecutor
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.repair import repair
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import Plan, adopt, draft_plan
from latentmill.jobs.plans.planned import PLAN_PATH, canonical, fingerprint
from latentmill.jobs.reuse_preview import preview_reuse
from latentmill.jobs.show.report import report
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.fakes import FakeEngine

pytestmark = pytest.mark.long

BROKEN = "its weights are torn"
loads: Counter[str] = Counter()


@dataclass
class Tinted(FakeEngine):
    """Pictures that differ from model to model."""

    tint: int = 0

    def generate(self, requests):
        return [
            result if result.pixels is None else replace(result, pixels=result.pixels ^ self.tint)
            for result in super().generate(requests)
        ]


def tinted_engine(plan: Plan, device: str) -> Tinted:
    """The plan's model; `broken` ones cannot be loaded. Counts who is loaded how often in this process."""
    loads[plan.model.name] += 1
    if "broken" in plan.model.name:
        raise RuntimeError(BROKEN)
    return Tinted(batch_size=plan.batch_size, tint=int(plan.model.digest[:2], 16))


def noted_engine(plan: Plan, device: str) -> Tinted:
    """The same, in any process: who loads what is noted in a file beside the models."""
    with (Path(plan.model.source).parent / "loads.txt").open("a") as notes:
        notes.write(f"{os.getpid()} {plan.model.name}\n")
    return tinted_engine(plan, device)


def fatal_engine(plan: Plan, device: str) -> Tinted:
    """A broken model whose loading ends the process."""
    if "broken" in plan.model.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return tinted_engine(plan, device)


def healed_engine(plan: Plan, device: str) -> Tinted:
    """The same, where the broken model can be loaded by now."""
    loads[plan.model.name] += 1
    return Tinted(batch_size=plan.batch_size, tint=int(plan.model.digest[:2], 16))


def broken_store(plan: Plan, device: str) -> FakeEngine:
    """A model that cannot be fetched."""
    raise StorageError("the bucket does not answer", transient=True)


@pytest.fixture
def sweep(tmp_path, tiny_model, manifest):
    """A function from names of models to a spec that sweeps over them, each a folder with a file of its own."""
    prompts = manifest(3)
    loads.clear()

    def make(*names: str, out: str = "out", **settings) -> JobSpec:
        places = []
        for name in names:
            place = tmp_path / "models" / name
            if not place.exists():
                shutil.copytree(tiny_model, place)
                index = json.loads((place / "model_index.json").read_text())
                (place / "model_index.json").write_text(json.dumps(index | {"_name": name}))
                config = place / "unet" / "config.json"
                config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": name}))
            places.append(str(place))
        flags = {"sweep": {"model": places, "seed": [1, 2]}, "chunk_size": 4, **settings}
        return job_spec(tiny_model, prompts, tmp_path / out, **flags)

    return make


def statuses(out: str) -> Counter[tuple[str, str]]:
    rows = read_dataset(out).rows
    names = (Path(place).name for place in rows.column("model").to_pylist())
    return Counter(zip(names, rows.column("status").to_pylist(), strict=True))


def test_chunks_are_of_one_model_and_samples_follow_the_manifest(sweep):
    spec = sweep("a", "b")
    with draft_plan(spec) as draft:
        summary = draft.summary()
        plan = adopt(draft, Storage.open(spec.out))
    assert [(note.name, note.samples) for note in summary.models] == [("a", 6), ("b", 6)]
    assert summary.chunks == 4
    chunks = [plan.samples_of_chunk(chunk) for chunk in range(plan.n_chunks)]
    assert [{sample.model for sample in chunk} for chunk in chunks] == [{0}, {0}, {1}, {1}]
    assert [plan.model_of(chunk) for chunk in range(4)] == [0, 0, 1, 1]
    ordered = sorted((sample for chunk in chunks for sample in chunk), key=lambda sample: sample.ordinal)
    assert [sample.model for sample in ordered] == [0, 0, 1, 1] * 3
    assert [sample.request.seed for sample in ordered] == [1, 2] * 6


def test_each_model_is_loaded_once_and_rows_name_theirs(sweep):
    spec = sweep("a", "b")
    assert run(spec, engine_factory=tinted_engine).exit_code == 0
    assert loads == {"a": 1, "b": 1}
    rows = read_dataset(spec.out).rows.to_pylist()
    job = open_job(spec.out)
    for row in rows:
        model = job.plan.models[["a", "b"].index(Path(row["model"]).name)]
        assert (row["model"], row["model_sha256"]) == (model.source, model.digest)
    assert len({row["pixel_sha256"] for row in rows}) == 12
    assert "latentmill.model" not in job.plan.file_metadata
    assert "latentmill.version" in job.plan.file_metadata
    assert verify(spec.out).exit_code == 0
    assert run(spec, engine_factory=tinted_engine).generated == 0
    assert loads == {"a": 1, "b": 1}


def test_a_model_draws_the_same_alone_and_beside_others(sweep, tmp_path):
    both = sweep("a", "b")
    run(both, engine_factory=tinted_engine)
    alone = sweep("b", out="alone")
    run(alone, engine_factory=tinted_engine)
    digests = [row["pixel_sha256"] for row in read_dataset(alone.out).rows.to_pylist()]
    of_b = [row for row in read_dataset(both.out).rows.to_pylist() if Path(row["model"]).name == "b"]
    assert [row["pixel_sha256"] for row in of_b] == digests


def test_a_model_that_cannot_be_loaded_costs_its_own_samples_and_a_retry_makes_them(sweep):
    spec = sweep("broken", "a")
    summary = run(spec, engine_factory=tinted_engine)
    assert summary.exit_code == 1
    assert statuses(spec.out) == {("broken", "failed"): 6, ("a", "ok"): 6}
    failed = [row for row in read_dataset(spec.out).rows.to_pylist() if row["status"] == "failed"]
    assert all(row["error"].endswith(f"broken could not be loaded: RuntimeError: {BROKEN}") for row in failed)
    assert len(summary.execution_classes) == 1
    assert loads == {"broken": 1, "a": 1}
    assert verify(spec.out).exit_code == 0
    retry = replace(spec, runtime=replace(spec.runtime, retry_failed=True))
    assert run(retry, engine_factory=tinted_engine).counts == {"ok": 6, "flagged": 0, "failed": 6}
    assert run(retry, engine_factory=healed_engine).exit_code == 0
    assert statuses(spec.out) == {("broken", "ok"): 6, ("a", "ok"): 6}
    assert verify(spec.out).exit_code == 0


def test_a_checkpoint_that_cannot_even_be_read_costs_its_own_samples_unless_strict(sweep, tmp_path):
    spec = sweep("a", "torn")
    config = tmp_path / "models" / "torn" / "unet" / "config.json"
    whole = config.read_text()
    config.write_text(whole[:20])
    with draft_plan(spec) as draft:
        summary = draft.summary()
    assert [(note.family, note.samples) for note in summary.models] == [("stable-diffusion", 6), ("cannot be used", 6)]
    assert any("torn" in note and "its samples will fail" in note for note in summary.notes)
    with pytest.raises(UsageError, match="torn"):
        draft_plan(replace(spec, strict=True))
    assert run(spec, engine_factory=tinted_engine).exit_code == 1
    assert statuses(spec.out) == {("a", "ok"): 6, ("torn", "failed"): 6}
    assert loads == {"a": 1}
    rows = [row for row in read_dataset(spec.out).rows.to_pylist() if row["status"] == "failed"]
    assert {row["model_sha256"] for row in rows} == {None}
    assert all("torn" in row["error"] for row in rows)
    assert verify(spec.out).exit_code == 0
    config.write_text(whole)
    with draft_plan(spec) as draft, pytest.raises(OutputConflictError, match="model 2: "):
        adopt(draft, Storage.open(spec.out))


def test_rows_may_name_their_model_and_a_bad_name_costs_its_row(sweep, tmp_path):
    spec = sweep("a", "b")
    path = tmp_path / "rows.csv"
    a, b = spec.sweep["model"]
    path.write_text(f"prompt,model,mood\nx,{b},1\ny,,2\nz,{a},3\nw,/nowhere/at-all,4\nv,{b},5\n")
    spec = replace(spec, prompts=(str(path),), sweep={"seed": [1, 2]}, model=a)
    with draft_plan(spec) as draft:
        summary = draft.summary()
    assert [(note.name, note.samples) for note in summary.models] == [("b", 4), ("a", 4)]
    assert "nowhere/at-all" in summary.first_rejects[0].reason
    assert run(spec, engine_factory=tinted_engine).exit_code == 0
    assert loads == {"a": 1, "b": 1}
    rows = read_dataset(spec.out).rows.to_pylist()
    assert [(row["prompt"], Path(row["model"]).name) for row in rows[::2]] == [
        ("x", "b"),
        ("y", "a"),
        ("z", "a"),
        ("v", "b"),
    ]
    assert verify(spec.out).exit_code == 0
    assert run(spec, engine_factory=tinted_engine).generated == 0
    axis = replace(spec, sweep={"model": [a]}, out=str(tmp_path / "axis"))
    assert run(axis, engine_factory=tinted_engine).exit_code == 0
    assert statuses(axis.out) == {("a", "ok"): 5}  # an axis takes the place of the column


def test_where_no_model_can_be_loaded_nothing_is_called_failed(sweep):
    spec = sweep("broken", "broken-too")
    with pytest.raises(JobError, match=f"no model of the job can be loaded; .*{BROKEN}"):
        run(spec, engine_factory=tinted_engine)
    assert not open_job(spec.out).ledger.committed().any()
    assert run(spec, engine_factory=healed_engine).exit_code == 0


def test_a_store_that_does_not_answer_is_no_fault_of_a_model(sweep):
    spec = sweep("a", "b")
    with pytest.raises(JobError, match="the bucket does not answer"):
        run(spec, engine_factory=broken_store)
    assert not open_job(spec.out).ledger.committed().any()


def test_a_run_that_ends_before_the_broken_model_was_told_resumes_to_the_same_rows(sweep):
    whole = sweep("broken", "a")
    run(whole, engine_factory=tinted_engine)
    spec = sweep("broken", "a", out="again")
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))
    executor = InlineExecutor(open_job(spec.out), engine_factory=tinted_engine)
    assert [result.chunk for result in executor.run([2, 3])] == [2, 3]  # all of a
    executor.close()
    assert run(spec, engine_factory=tinted_engine).exit_code == 1
    assert read_dataset(spec.out).rows.equals(read_dataset(whole.out).rows)


@pytest.mark.cluster
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # Ray 2.60 uses its own old settings
@pytest.mark.parametrize("engine", [noted_engine, fatal_engine])
def test_workers_of_a_cluster_load_each_model_once_at_most_and_outlive_a_broken_one(sweep, tmp_path, engine):
    settings = {"num_images": 4, "threads_per_actor": 1}
    calm = sweep("a", "broken", "b", **settings)
    run(calm, engine_factory=tinted_engine)
    spec = sweep("a", "broken", "b", out="ray", executor="ray", **settings)
    summary = run(spec, engine_factory=engine)
    assert (summary.exit_code, summary.left_out) == (1, ())
    assert statuses(spec.out) == {("a", "ok"): 24, ("broken", "failed"): 24, ("b", "ok"): 24}
    assert verify(spec.out).exit_code == 0
    if engine is noted_engine:
        assert read_dataset(spec.out).rows.equals(read_dataset(calm.out).rows)
        notes = Counter((tmp_path / "models" / "loads.txt").read_text().split("\n")[:-1])
        assert set(notes.values()) == {1}


def test_damaged_pictures_of_several_models_are_made_again_by_theirs(sweep, tmp_path):
    spec = sweep("a", "b")
    run(spec, engine_factory=tinted_engine)
    before = read_dataset(spec.out).files
    for picture in sorted((tmp_path / "out" / "images").rglob("*.png"))[::2]:
        picture.unlink()
    assert repair(spec.out, engine_factory=tinted_engine).exit_code == 0
    assert read_dataset(spec.out).files == before


def test_sheets_have_the_models_as_an_axis_by_their_names(sweep):
    spec = sweep("a", "b")
    run(spec, engine_factory=tinted_engine)
    plan = open_job(spec.out).plan
    assert plan.shown_dimensions[0][0].values == ("a", "b")
    assert report(spec.out).samples_shown == 12


def test_models_count_for_what_they_are_and_in_their_order(sweep, tmp_path):
    spec = sweep("a", "b")
    with draft_plan(spec) as draft:
        adopt(draft, Storage.open(spec.out))
    shutil.copytree(tmp_path / "models" / "a", tmp_path / "models" / "moved")
    moved = replace(spec, sweep={**spec.sweep, "model": [str(tmp_path / "models" / "moved"), spec.sweep["model"][1]]})
    with draft_plan(moved) as draft:
        assert adopt(draft, Storage.open(spec.out)).models[0].name == "a"
    for other in (sweep("b", "a"), sweep("a", "c")):
        with draft_plan(other) as draft, pytest.raises(OutputConflictError, match=r"model [12]: "):
            adopt(draft, Storage.open(spec.out))


def test_a_plan_without_a_model_that_its_samples_need_is_refused(sweep):
    spec = sweep("a", "b")
    storage = Storage.open(spec.out)
    with draft_plan(spec) as draft:
        adopt(draft, storage)
    document = json.loads(storage.read(PLAN_PATH))
    del document["checksum"], document["models"][1]
    storage.write(PLAN_PATH, canonical({**document, "checksum": fingerprint(document)}).encode())
    with pytest.raises(JobError, match="its models are not those that its samples need"):
        open_job(spec.out)


def test_cells_of_another_output_are_taken_model_by_model(sweep):
    last = sweep("a", "b", out="last")
    run(last, engine_factory=tinted_engine)
    spec = sweep("c", "b")
    spec = replace(spec, runtime=replace(spec.runtime, reuse=(last.out,)))
    with draft_plan(spec) as draft:
        seen = preview_reuse(draft)
    assert seen is not None
    assert (seen.held, seen.notes) == ({last.out: 6}, ())
    assert {(cell.axis, Path(cell.value).name): cell.held for cell in seen.axes} == {
        ("model", "c"): 0, ("model", "b"): 6, ("seed", "1"): 3, ("seed", "2"): 3,
    }  # fmt: skip
    summary = run(spec, engine_factory=tinted_engine)
    assert (summary.exit_code, summary.reused, summary.generated) == (0, 6, 6)
    undisturbed = replace(spec, out=f"{spec.out}-alone", runtime=replace(spec.runtime, reuse=()))
    run(undisturbed, engine_factory=tinted_engine)
    rows, alone = (read_dataset(out).rows.drop_columns(["reused_from"]) for out in (spec.out, undisturbed.out))
    assert rows.equals(alone)
    assert verify(spec.out).exit_code == 0


def test_a_pattern_names_every_checkpoint_and_presets_keep_their_place(tmp_path, tiny_model, manifest):
    for step in (200, 100):
        shutil.copytree(tiny_model, tmp_path / "runs" / f"step-{step}")
    spec = job_spec(tiny_model, manifest(1), tmp_path / "out", sweep={"model": f"{tmp_path}/runs/step-*,embedded"})
    assert spec.sweep["model"] == [f"{tmp_path}/runs/step-100", f"{tmp_path}/runs/step-200", "embedded"]
    with draft_plan(spec) as draft:
        assert [note.name for note in draft.summary().models] == ["step-100", "step-200", "embedded"]
        assert any("suggests" in note and "--zip model,width,height" in note for note in draft.notes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sweep": {"model": ["/nowhere/at-all"]}}, "nowhere/at-all"),
        ({"sweep": {"model": "/nowhere/*.ckpt"}}, "matches no file"),
        ({"sweep": {"model": ["embedded", "embedded"]}}, "embedded' twice"),
        ({"sweep": {"model": ["embedded"]}, "revision": "main"}, "revision 'main' is of one model"),
    ],
)
def test_an_axis_of_models_that_are_not_there_is_refused(settings, words, tiny_model, manifest, tmp_path):
    with (
        pytest.raises(UsageError, match=words),
        draft_plan(job_spec(tiny_model, manifest(1), tmp_path / "o", **settings)),
    ):
        pass
