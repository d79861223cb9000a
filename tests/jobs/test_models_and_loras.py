"""A sweep over models and over scales of a LoRA: each model is drawn with it, and one that it does not fit is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.executors.inline import InlineExecutor
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.pictures import pixel_sha256
from latentmill.jobs.outputs.regenerate import regenerate
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.recipe import recipe_of
from latentmill.jobs.show.report import report
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.submission.places import visible_to_nodes
from latentmill.jobs.worker import load_engine
from tests.engine.loras import random_terms, write_kohya
from tests.harness.models import write_tiny_model
from tests.jobs.driver import job_spec, read_dataset, run
from tests.jobs.show.test_gallery import meta_of, rows_of

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(tiny_model), str(write_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=5))]


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    terms = random_terms(UNet2DConditionModel.from_pretrained(tiny_model / "unet"), 1)
    return write_kohya(tmp_path_factory.mktemp("loras") / "ink.safetensors", {"lora_unet": terms})


@pytest.fixture
def sweep(models: list[str], lora: Path, manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., JobSpec]:
    def make(axes: dict[str, Any], out: str = "out", model: str = "", **settings: Any) -> JobSpec:
        given = {"safety": "none", "lora": [f"ink={lora}:0.5"], "seed": 3, "sweep": axes, **settings}
        return replace(job_spec(models[0], manifest(1), tmp_path / out, **given), model=model or models[0])

    return make


def of_model(rows: list[dict[str, Any]], model: str) -> list[tuple[str, str, str]]:
    chosen = [row for row in rows if row["model"] == model]
    return [(row["loras"], row["pixel_sha256"], row["model_sha256"]) for row in chosen]


def test_every_model_is_drawn_with_every_scale_and_a_stopped_run_resumes_to_the_same_rows(
    sweep: Callable[..., JobSpec], models: list[str], lora: Path
) -> None:
    axes = {"model": models, "lora.ink": [0, 0.8], "seed": [3]}
    spec = sweep(axes)
    assert run(spec, engine_factory=load_engine).exit_code == 0
    rows = read_dataset(spec.out).rows.to_pylist()
    assert [(row["model"], row["loras"]) for row in rows] == [
        (model, loras) for model in models for loras in ("", "ink:0.8")
    ]
    assert len({row["pixel_sha256"] for row in rows}) == 4
    plan = open_job(spec.out).plan
    for row, model in zip(rows, [0, 0, 1, 1], strict=True):
        assert row["model_sha256"] == plan.models[model].digest
        assert list(json.loads(row["lora_files"])["ink"]["sha256"]) == ["ink.safetensors"]
    assert verify(spec.out).defects == ()

    stopped = sweep(axes, out="stopped")
    with draft_plan(stopped) as draft:
        adopt(draft, Storage.open(stopped.out))
    executor = InlineExecutor(open_job(stopped.out), engine_factory=load_engine)
    assert [result.chunk for result in executor.run([1])] == [1]
    executor.close()
    summary = run(stopped, engine_factory=load_engine)
    assert (summary.exit_code, summary.generated) == (0, 2)
    assert read_dataset(stopped.out).rows.equals(read_dataset(spec.out).rows)

    alone = sweep({"lora.ink": [0, 0.8], "seed": [3]}, out="alone", model=models[1])
    run(alone, engine_factory=load_engine)
    assert of_model(read_dataset(alone.out).rows.to_pylist(), models[1]) == of_model(rows, models[1])

    recipe = recipe_of(rows[3])
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) == rows[3]["pixel_sha256"]
    again = regenerate(spec.out, [3, 0, 2, 1], destination=f"{spec.out}-again")
    assert [(sample.sample_id, sample.outcome) for sample in again.samples] == [
        (row["sample_id"], "identical") for row in rows
    ]
    assert verify(spec.out, regenerate_n=4).defects == ()
    report(spec.out)
    assert meta_of(spec.out)["axes"] == [
        {"name": "model", "values": ["tiny", "other"]},
        {"name": "loras", "values": []},
    ]
    places = [row["model"] for row in rows_of(spec.out)]  # whole, beside each picture
    assert places == [model for model in models for _ in range(2)]


def test_a_lora_is_merged_into_every_model_and_counts_in_the_plan(
    sweep: Callable[..., JobSpec], models: list[str], lora: Path
) -> None:
    spec = sweep({"model": models, "seed": [3]})
    assert run(spec, engine_factory=load_engine).exit_code == 0
    rows = read_dataset(spec.out).rows.to_pylist()
    assert all(row["execution_class"].endswith(", merged ink:0.5") for row in rows)
    for other in (f"ink={lora}:0.6", None):
        changed = sweep({"model": models, "seed": [3]}, lora=[other] if other else [])
        with draft_plan(changed) as draft, pytest.raises(OutputConflictError, match="lora"):
            adopt(draft, Storage.open(spec.out))


def test_a_model_that_the_lora_does_not_fit_costs_its_own_samples(
    sweep: Callable[..., JobSpec], models: list[str], manifest: Callable[..., Path], tmp_path: Path
) -> None:
    spec = sweep({"model": ["embedded", models[0]], "seed": [3]})
    with draft_plan(spec) as draft:
        summary = draft.summary()
        assert draft.rejects.count == 0
    assert [note.family for note in summary.models] == ["cannot be used", "stable-diffusion"]
    assert summary.loras == {"ink": 0.5}
    assert any("embedded" in note and "its samples will fail" in note for note in summary.notes)
    assert run(spec, engine_factory=load_engine).exit_code == 1
    failed, made = read_dataset(spec.out).rows.to_pylist()
    assert (failed["status"], failed["model_sha256"], made["status"], made["loras"]) == (
        "failed",
        None,
        "ok",
        "ink:0.5",
    )
    assert verify(spec.out).defects == ()
    for refused in (
        replace(spec, strict=True),
        sweep({"model": ["embedded"]}),
        replace(spec, sweep={}, model="embedded"),
    ):
        with pytest.raises(UsageError, match="embedded"), draft_plan(refused):
            pass
    prompts = tmp_path / "rows.csv"
    prompts.write_text(f"prompt,model\nx,embedded\ny,{models[0]}\n")
    with draft_plan(replace(spec, prompts=(str(prompts),), sweep={})) as draft:
        assert (draft.n_rows, draft.rejects.count) == (1, 1)
        assert "embedded" in draft.rejects.first[0][1].reason


def test_another_autoencoder_decodes_for_every_model(sweep: Callable[..., JobSpec], models: list[str]) -> None:
    spec = sweep({"model": models, "seed": [3]}, lora=[], vae=f"{models[1]}/vae")
    assert run(spec, engine_factory=load_engine).exit_code == 0
    rows = read_dataset(spec.out).rows.to_pylist()
    assert {row["vae"] for row in rows} == {f"{models[1]}/vae"}
    plan = open_job(spec.out).plan
    assert len({model.files["vae/config.json"] for model in plan.models}) == 1
    assert verify(spec.out).defects == ()


def test_models_and_loras_of_a_sweep_are_told_to_a_cluster_by_their_whole_places(
    sweep: Callable[..., JobSpec], models: list[str], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(models[1]).parent)
    spec = replace(sweep({"model": ["other", "embedded"]}), out="s3://bucket/out", model="embedded")
    spec = replace(spec, runtime=replace(spec.runtime, executor="ray"))
    shared = visible_to_nodes(spec, shared_filesystem=True)
    assert (shared.sweep["model"], shared.lora) == ([models[1], "embedded"], {"ink": f"{lora}:0.5"})
