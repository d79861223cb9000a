"""A job whose model is a transformer of flow matching: planned, drawn, committed and published like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from latentmill.jobs.errors import UsageError
from latentmill.jobs.ledger.pictures import pixel_sha256
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.planning import draft_plan
from latentmill.jobs.recipe import recipe_of
from latentmill.jobs.worker import load_engine
from tests.engine.diffusers_models import write_flux, write_sd3
from tests.jobs.driver import job_spec, read_dataset, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"sd3": write_sd3(root / "sd3"), "flux": write_flux(root / "flux")}


@pytest.mark.parametrize(("name", "spacing"), [("sd3", "linspace"), ("flux", "trailing")])
def test_a_job_mixes_steps_samplers_and_guidance(
    folders: dict[str, Path], manifest: Callable[..., Path], tmp_path: Path, name: str, spacing: str
):
    axes = {"guidance_scale": [1.0, 3.0], "num_inference_steps": [1, 2], "sampler": ["euler", "dpmpp_2m"]}
    spec = job_spec(folders[name], manifest(["a red cat"]), tmp_path / "out", sweep=axes, safety="none")
    summary = run(spec, engine_factory=load_engine)
    assert (summary.exit_code, summary.generated) == (0, 8)
    rows = read_dataset(str(tmp_path / "out")).rows
    assert set(rows.column("status").to_pylist()) == {"ok"}
    assert len(set(rows.column("pixel_sha256").to_pylist())) == 8
    assert set(rows.column("prediction_type").to_pylist()) == {"flow"}
    assert set(rows.column("timestep_spacing").to_pylist()) == {spacing}
    assert verify(str(tmp_path / "out")).exit_code == 0
    assert run(spec, engine_factory=load_engine).generated == 0
    row = rows.to_pylist()[-1]
    recipe = recipe_of(row)
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) == row["pixel_sha256"]


def test_rows_with_an_image_start_from_it_beside_others(folders: dict[str, Path], tmp_path: Path):
    Image.new("RGB", (80, 64), "orange").save(tmp_path / "a.png")
    prompts = tmp_path / "rows.csv"
    prompts.write_text("prompt,image,strength\na red cat,a.png,0.5\na red cat,,\n")
    spec = job_spec(folders["flux"], prompts, tmp_path / "out", num_inference_steps=2, safety="none")
    assert run(spec, engine_factory=load_engine).exit_code == 0
    first, second = read_dataset(spec.out).rows.to_pylist()
    assert (first["width"], first["height"], second["init_image"]) == (64, 64, None)
    assert verify(spec.out).exit_code == 0
    recipe = recipe_of(first)
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) == first["pixel_sha256"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sampler": "ddim"}, "sampler 'ddim' is not one of euler, dpmpp_2m"),
        ({"width": 72}, "width 72 is not a multiple of 16"),
        ({"height": 288}, "height 288 is more than 256, the model's longest side"),
        ({"sweep": {"width": [256, 320]}}, "width 320 is more than 256, the model's longest side"),
        ({"prompt_syntax": "a1111"}, "of stable-diffusion-3 take no weights and no chunks"),
        ({"long_prompts": "chunk"}, "of stable-diffusion-3 take no weights and no chunks"),
        ({"timestep_spacing": "leading"}, "timestep_spacing='leading'"),
        ({"prediction_type": "epsilon"}, "of flow matching, but the job has prediction_type='epsilon'"),
    ],
)
def test_what_it_cannot_take_is_refused_by_the_plan(folders, manifest, tmp_path, settings, reason):
    with pytest.raises(UsageError, match=reason):
        draft_plan(job_spec(folders["sd3"], manifest(), tmp_path / "out", **settings))


def test_the_plan_counts_the_prompts_that_t5_cuts(folders, manifest, tmp_path):
    prompts = manifest(["x" * 200, "x" * 300])
    with draft_plan(job_spec(folders["sd3"], prompts, tmp_path / "out")) as draft:
        summary = draft.summary()
    assert (summary.token_limit, summary.tokens_over_limit) == (255, 1)
    assert summary.parameters["sampler"] == "euler"
    assert summary.model_family == "stable-diffusion-3"
