"""A row identifies its picture: with nothing else in hand, the same pixels are made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.engine import acceleration
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.pictures import pixel_sha256
from latentmill.jobs.models.cache import listing_digest
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.columns import own_names
from latentmill.jobs.recipe import Recipe, recipe_of
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.worker import load_engine
from tests.harness.models import write_model
from tests.jobs.driver import job_spec, run

pytestmark = pytest.mark.slow

Manifest = Callable[..., Path]
PROMPTS = ["a (red:1.4) circle", "a blue square"]
UNUSUAL: Mapping[str, Any] = {
    "prompt_syntax": "a1111",
    "long_prompts": "chunk",
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "guidance_scale": 7.3,
    "eta": 0.7,
    "nsfw_threshold": 1e-6,
    "on_flagged": "keep",
    "watermark": "dwtDct",
    "watermark_text": "mine",
    "width": 256,
    "height": 256,
    "chunk_size": 3,
    "dtype": "bfloat16",
}


def finished(spec: JobSpec) -> Job:
    summary = run(spec, engine_factory=load_engine)
    assert (summary.exit_code, summary.failures) == (0, ())
    return open_job(spec.out)


def part_of(out: Path) -> pa.Table:
    (part,) = (out / "dataset").glob("*.parquet")
    return pq.read_table(part)


@pytest.fixture(scope="module")
def two_jobs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of one dataset, concatenated out of two jobs with two models and two syntaxes."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    finished(job_spec(tiny_model, folder / "prompts.txt", folder / "one"))
    other = write_model(folder / "other", seed=5)
    finished(job_spec(other, folder / "prompts.txt", folder / "two", **UNUSUAL))
    rows: list[dict[str, Any]] = pa.concat_tables([part_of(folder / "one"), part_of(folder / "two")]).to_pylist()
    return rows


def test_a_picture_is_made_again_from_nothing_but_one_row(two_jobs: list[dict[str, Any]]) -> None:
    assert len({row["model_sha256"] for row in two_jobs}) == 2
    assert {row["prompt_syntax"] for row in two_jobs} == {"plain", "a1111"}
    assert [row["status"] for row in two_jobs] == ["ok", "ok", "flagged", "flagged"]
    for row in two_jobs:
        recipe = recipe_of(row)
        engine = recipe.load("cpu")
        assert engine.execution_class == row["execution_class"]
        assert recipe.dtype == ("float32" if row["prompt_syntax"] == "plain" else "bfloat16")
        assert pixel_sha256(recipe.draw(engine)) == row["pixel_sha256"], row["sample_id"]


def test_a_row_says_how_its_picture_was_run(two_jobs: list[dict[str, Any]]) -> None:
    row = two_jobs[0]
    assert recipe_of(row).execution == "eager"
    compiled = acceleration.settings("compiled")
    for ending in (compiled, f"{compiled}, merged sepia=1"):
        assert recipe_of(row | {"execution_class": f"cuda, float16, {ending}"}).execution == "compiled"


def test_a_row_that_overflowed_says_which_half_precision_it_was_tried_in(two_jobs: list[dict[str, Any]]) -> None:
    row = two_jobs[0] | {"precision": "fp32-retry"}
    for dtype in ("float16", "bfloat16"):
        there = row["execution_class"].replace("float32", dtype)
        assert recipe_of(row | {"execution_class": there}).dtype == dtype


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt_syntax", "plain"),
        ("timestep_spacing", "leading"),
        ("prediction_type", "epsilon"),
        ("eta", 0.0),
        ("watermark_text", "ours"),
        ("guidance_scale", 7.25),
        ("on_flagged", "blank"),
    ],
)
def test_the_columns_are_what_the_picture_follows_from(
    column: str, value: object, two_jobs: list[dict[str, Any]]
) -> None:
    row = two_jobs[2]
    assert row[column] != value
    recipe = recipe_of(row | {column: value})
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) != row["pixel_sha256"]


def _same(column: str) -> Callable[[Recipe, dict[str, Any]], object]:
    return lambda _, row: row[column]


IDENTITY: Mapping[str, Callable[[Recipe, dict[str, Any]], object]] = {
    "prediction_type": _same("prediction_type"),
    "timestep_spacing": _same("timestep_spacing"),
    "prompt_syntax": _same("prompt_syntax"),
    "long_prompts": _same("long_prompts"),
    "batch_size": _same("batch_size"),
    "on_flagged": _same("on_flagged"),
    "watermark": _same("watermark"),
    "watermark_text": _same("watermark_text"),
    "safety": _same("nsfw_checker"),
    "nsfw_threshold": lambda recipe, _: recipe.safety_threshold,
    "dtype": lambda recipe, _: recipe.dtype,
    "execution": lambda recipe, _: recipe.execution,
    "threads_per_actor": lambda recipe, _: recipe.threads,
    "device": lambda recipe, _: "cpu" if recipe.threads else "cuda",
}
"""The plan's identity, told from a row."""
SAMPLES_OWN = {"parameters", "axes", "manifest"}
"""What has become the request of each sample."""
SEEN_BY_ITS_EFFECT = {"chunk_size", "watermark_policy", "template"}
"""Which batch and slot a sample came into, which watermark and which prompt it got in the end: the row says it."""


def test_every_setting_that_can_change_a_picture_is_in_its_row(
    tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    # No weights here: a random encoder's states have a mean of about 0, by which A1111's rule divides, and with two
    # threads its last digits differ from run to run.
    plain = manifest(["a red circle", "a blue square"])
    spec = job_spec(tiny_model, plain, tmp_path / "out", safety="open-nsfw", threads_per_actor=2, **UNUSUAL)
    job = finished(spec)
    identity = dict(job.plan.identity)
    assert listing_digest(identity.pop("model_files")) == job.plan.model.digest
    assert identity.keys() == IDENTITY.keys() | SAMPLES_OWN | SEEN_BY_ITS_EFFECT, "a new setting needs its column"
    samples = {sample.sample_id: sample for sample in job.plan.samples_of_chunk(0)}
    for row in part_of(tmp_path / "out").to_pylist():
        recipe = recipe_of(row)
        assert {name: tell(recipe, row) for name, tell in IDENTITY.items()} == {
            name: identity[name] for name in IDENTITY
        }
        assert recipe.request == samples[row["sample_id"]].request
        assert (row["model"], row["model_sha256"]) == (str(tiny_model), job.plan.model.digest)
        assert row["version"] == job.plan.versions["latentmill"]


def test_the_files_say_the_same_of_themselves(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    job = finished(job_spec(tiny_model, manifest(1), tmp_path / "out", safety="none"))
    record = job.ledger.read(0)
    assert record is not None
    for metadata in (
        part_of(tmp_path / "out").schema.metadata,
        {f"latentmill.{name}".encode(): text.encode() for name, text in record.metadata.items()},
    ):
        said = {name.decode(): text.decode() for name, text in metadata.items()}
        assert said["latentmill.plan_hash"] == job.plan.plan_hash
        assert said["latentmill.model_sha256"] == job.plan.model.digest
        assert said["latentmill.prompt_syntax"] == "plain"
        assert "latentmill.safety_threshold" not in said
        assert "latentmill.model_license" not in said


def test_a_presets_license_is_in_the_files(manifest: Manifest, tmp_path: Path) -> None:
    run(job_spec("embedded", manifest(1), tmp_path / "out"))
    assert part_of(tmp_path / "out").schema.metadata[b"latentmill.model_license"] == b"Apache-2.0"
    assert part_of(tmp_path / "out").column("model").to_pylist() == ["embedded"]


def test_a_manifests_own_column_of_such_a_name_gets_the_prefix(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,tokenizer,version\na circle,theirs,9\n")
    run(job_spec(tiny_model, rows, tmp_path / "out"))
    (row,) = part_of(tmp_path / "out").to_pylist()
    assert (row["manifest_tokenizer"], row["manifest_version"], row["model"]) == ("theirs", "9", str(tiny_model))
    assert verify(str(tmp_path / "out")).defects == ()


def test_what_is_no_recipe_is_refused(two_jobs: list[dict[str, Any]]) -> None:
    row = two_jobs[0]
    with pytest.raises(UsageError, match="has no column prompt_syntax"):
        recipe_of({name: value for name, value in row.items() if name != "prompt_syntax"})
    with pytest.raises(UsageError, match="has no picture: its status is failed"):
        recipe_of(row | {"status": "failed", "pixel_sha256": None})
    with pytest.raises(JobError, match="is not the row's"):
        recipe_of(row | {"model": two_jobs[2]["model"]}).load("cpu")
    assert row.keys() == own_names()
