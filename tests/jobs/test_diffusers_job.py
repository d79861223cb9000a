"""A job whose model is a pipeline of the library diffusers: planned, drawn, committed and published like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.planning import draft_plan
from latentmill.jobs.worker import load_engine
from tests.engine.diffusers_models import write_pixart
from tests.jobs.driver import job_spec, read_dataset, run

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixart(tmp_path_factory.mktemp("models") / "pixart")


def test_a_job_draws_with_a_pipeline_of_diffusers(pixart: Path, manifest: Callable[..., Path], tmp_path: Path):
    prompts = manifest(["a red cat", "a sad dog", "a blue bird"])
    spec = job_spec(pixart, prompts, tmp_path / "out", sweep={"guidance_scale": [1.0, 3.0]}, safety="none")
    summary = run(spec, engine_factory=load_engine)
    assert (summary.exit_code, summary.generated) == (0, 6)
    rows = read_dataset(str(tmp_path / "out")).rows
    assert set(rows.column("status").to_pylist()) == {"ok"}
    assert set(rows.column("sampler").to_pylist()) == {"default"}
    assert rows.column("prompt_tokens").to_pylist() == [10, 10, 10, 10, 12, 12]
    assert len(set(rows.column("pixel_sha256").to_pylist())) == 6
    assert all(", diffusers " in text for text in rows.column("execution_class").to_pylist())
    assert verify(str(tmp_path / "out")).exit_code == 0
    assert run(spec, engine_factory=load_engine).generated == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"sampler": "ddim"},
            "sampler ddim: sampler 'ddim' is not one of default: PixArtSigmaPipeline samples by",
        ),
        ({"width": 72}, "width 72 is not a multiple of 16"),
        ({"prompt_syntax": "a1111"}, "a PixArtSigmaPipeline reads prompts its own way"),
        ({"long_prompts": "error"}, "a PixArtSigmaPipeline reads prompts its own way"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing is 'trailing'"),
    ],
)
def test_what_it_cannot_take_is_refused_by_the_plan(pixart, manifest, tmp_path, settings, reason):
    with pytest.raises(UsageError, match=reason):
        draft_plan(job_spec(pixart, manifest(), tmp_path / "out", **settings))


def test_the_plan_says_that_the_limit_of_tokens_is_not_known(pixart, manifest, tmp_path):
    with draft_plan(job_spec(pixart, manifest(["x" * 500]), tmp_path / "out")) as draft:
        summary = draft.summary()
    assert (summary.token_limit, summary.tokens_over_limit) == (None, 0)
    assert summary.parameters["sampler"] == "default"
    assert summary.model_family == "PixArtSigmaPipeline"


def test_the_engines_own_models_refuse_the_default_sampler_by_plan(tiny_model, manifest, tmp_path):
    with pytest.raises(UsageError, match="'default' is not one of ddim"):
        draft_plan(job_spec(tiny_model, manifest(), tmp_path / "out", sampler="default"))
