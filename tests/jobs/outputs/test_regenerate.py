"""`regenerate` and `verify --regenerate`: a row alone makes its picture again, and what differs is measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from latentmill.cli import app
from latentmill.engine import GenerationResult
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs.redraw import Drawing, Redrawer, Regenerated
from latentmill.jobs.outputs.regenerate import RegenerateReport, parse_samples, regenerate
from latentmill.jobs.outputs.rows import draw_samples, rows_of
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.recipe import Recipe
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import FakeEngine

PROMPTS = ["one", "some nsfw", "poison three", "four", "five"]
SWEEP: Mapping[str, Any] = {"sweep": {"sampler": ["ddim", "euler_a"], "num_inference_steps": [2, 3]}}
Manifest = Callable[..., Path]


def same_engine(recipe: Recipe, device: str) -> FakeEngine:
    return FakeEngine(batch_size=recipe.batch_size)


@dataclass
class OffsetEngine(FakeEngine):
    """Every colour value is off by so much."""

    offset: int = 1

    def generate(self, requests: Any) -> list[GenerationResult]:
        return [
            result if result.pixels is None else replace(result, pixels=result.pixels ^ np.uint8(self.offset))
            for result in super().generate(requests)
        ]


def other_bits(offset: int, execution_class: str = "another one") -> Callable[[Recipe, str], FakeEngine]:
    return lambda recipe, _: OffsetEngine(batch_size=recipe.batch_size, offset=offset, execution_class=execution_class)


@pytest.fixture
def spec(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> JobSpec:
    return job_spec(tiny_model, manifest(PROMPTS), tmp_path / "out", chunk_size=4, batch_size=3, **SWEEP)


@pytest.fixture
def out(spec: JobSpec) -> str:
    run(spec)
    return spec.out


def again(out: str, samples: list[int], load: Any = same_engine, **options: Any) -> RegenerateReport:
    return regenerate(out, samples, drawing=Drawing(device="cpu", load=load, **options))


def snapshot(out: str) -> dict[str, bytes]:
    storage = Storage.open(out)
    return {path: storage.read(path) for path, _ in storage.list("")}


def outcomes(samples: tuple[Regenerated, ...]) -> set[str]:
    return {sample.outcome for sample in samples}


def test_every_picture_is_made_again_to_the_byte_from_its_row_alone(out: str) -> None:
    for part in Path(out, "_job").glob("manifest-*"):
        part.unlink()
    before, n_samples = snapshot(out), len(PROMPTS) * 4
    report = again(out, list(range(n_samples)))
    by_status = {status: {s.outcome for s in report.samples if s.status == status} for status in ("ok", "flagged")}
    assert by_status == {"ok": {"identical"}, "flagged": {"identical"}}
    assert snapshot(out) == before, "something inside the output was touched"
    assert report.destination == f"{out}-regenerated"
    for sample in report.samples:
        if sample.file is not None:
            assert Path(report.destination, sample.file).read_bytes() == before[str(sample.image)]
    assert sum(sample.file is not None for sample in report.samples) == n_samples - 4


def test_samples_without_a_picture_say_why(spec: JobSpec, tmp_path: Path) -> None:
    dropped = replace(spec, on_flagged="drop", out=str(tmp_path / "dropped"))
    run(dropped)
    rows = rows_of(open_job(dropped.out), range(20))
    failed = next(number for number, row in rows.items() if row["status"] == "failed")
    flagged = next(number for number, row in rows.items() if row["status"] == "flagged")
    report = again(dropped.out, [failed, flagged])
    told = {sample.status: sample for sample in report.samples}
    assert (report.exit_code, outcomes(report.samples)) == (1, {"no-picture"})
    assert "this prompt is poison" in told["failed"].words
    assert "--retry-failed" in told["failed"].words
    assert "the policy dropped its picture" in told["flagged"].words


def test_another_execution_class_is_measured_and_accepted_within_the_tolerance(out: str) -> None:
    (sample,) = again(out, [0], other_bits(1)).samples
    assert (sample.outcome, sample.max_difference, sample.mean_difference) == ("close", 1, 1.0)
    assert sample.psnr == pytest.approx(48.13, abs=0.01)
    strict = again(out, [0], other_bits(1), tolerance=0.99)
    assert (strict.exit_code, outcomes(strict.samples)) == (1, {"different"})
    assert "another execution class than the row's fake" in strict.samples[0].words


def test_on_the_rows_own_execution_class_no_difference_is_accepted(out: str) -> None:
    report = again(out, [0], other_bits(1, "fake"), tolerance=255)
    assert (report.exit_code, outcomes(report.samples)) == (1, {"different"})
    assert report.samples[0].words.startswith("different; max 1 of 255, mean 1, PSNR 48.1 dB; on the row's own")


def test_a_lost_original_does_not_stand_in_the_way_of_an_identical_picture(out: str) -> None:
    shutil.rmtree(Path(out, "images"))
    assert outcomes(again(out, [0]).samples) == {"identical"}
    (sample,) = again(out, [0], other_bits(1)).samples
    assert (sample.outcome, sample.max_difference) == ("different", None)
    assert f"latentmill repair {out}" in sample.words


def test_a_running_job_is_read_from_its_ledger(spec: JobSpec) -> None:
    run(replace(spec, runtime=replace(spec.runtime, shard="1/2")))
    job = open_job(spec.out)
    record = job.ledger.read(0)
    assert record is not None
    number = int(record.table.column("sample_id")[0].as_py())
    assert outcomes(again(spec.out, [number]).samples) == {"identical"}
    record = job.ledger.read(1)
    assert record is None
    missing = int(job.plan.samples_of_chunk(1)[0].sample_id)
    with pytest.raises(UsageError, match=f"sample {missing} is not in .* yet"):
        again(spec.out, [missing])
    with pytest.raises(UsageError, match="has no sample 20; its samples are 0 to 19"):
        again(spec.out, [20])


@pytest.mark.parametrize(
    "forged",
    [
        {"width": 60_000},
        {"num_inference_steps": 60_000},
        {"batch_size": 60_000},
        {"sample_id": "../../evil"},
        {"precision": "fp1"},
        {"execution_class": None},
        {"guidance_scale": None},
        {"lora_files": "{"},
        {"lora_files": '{"ink": 1}', "loras": "ink"},
        {"lora_files": '{"ink": {"place": "/nowhere"}}', "loras": "ink:x"},
    ],
    ids=str,
)
def test_a_row_that_no_job_writes_is_not_drawn(forged: dict[str, Any], out: str, tmp_path: Path) -> None:
    def refuse(recipe: Recipe, device: str) -> FakeEngine:
        raise AssertionError("it was loaded")

    job = open_job(out)
    row = {**rows_of(job, [0])[0], **forged}
    redrawer = Redrawer(job, Drawing(device="cpu", load=refuse), Storage.open(str(tmp_path / "to")))
    ((_, sample),) = redrawer.samples({0: row})
    assert sample.outcome == "not-made"
    assert not (tmp_path / "to").exists()


def test_a_model_that_is_not_at_hand_is_told_of_each_row(out: str) -> None:
    def absent(recipe: Recipe, device: str) -> FakeEngine:
        raise JobError("the model is gone")

    report = again(out, [0, 1], absent)
    assert [(sample.outcome, sample.detail) for sample in report.samples] == [("not-made", "the model is gone")] * 2
    assert report.exit_code == 1


def test_the_output_itself_is_no_place_for_them(out: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    for inside in (out, f"{out}/images/00000", str(tmp_path / "link" / "new")):
        with pytest.raises(UsageError, match="lies inside the dataset"):
            regenerate(out, [0], destination=inside)


def test_numbers_of_samples_are_read_as_people_write_them() -> None:
    assert parse_samples(["17", "00000003,8", "20:23"]) == [17, 3, 8, 20, 21, 22]
    for wrong in ("", "x", "-1", "5:5", "9:3", "0:999999999", "1.5"):
        with pytest.raises(UsageError, match="--sample"):
            parse_samples([wrong])


def test_verify_draws_the_same_samples_by_the_same_seed_and_names_what_differs(out: str) -> None:
    drawing = Drawing(device="cpu", load=same_engine)
    report = verify(out, regenerate_n=7, drawing=drawing)
    assert (report.defects, len(report.regenerated), report.regenerate_seed) == ((), 7, 42)
    assert {sample.outcome for sample in report.regenerated} == {"identical"}
    job = open_job(out)
    assert [int(sample.sample_id) for sample in report.regenerated] == sorted(draw_samples(job, 7, 42))
    assert draw_samples(job, 7, 42) != draw_samples(job, 7, 43)
    assert len(draw_samples(job, 1000, 1)) == 16, "those without a picture were drawn"
    bad = verify(out, regenerate_n=2, regenerate_seed=5, drawing=replace(drawing, load=other_bits(1, "fake")))
    assert {defect.kind for defect in bad.defects} == {"not-reproduced"}
    assert {defect.path for defect in bad.defects} == {sample.image for sample in bad.regenerated}
    assert bad.exit_code == 1


def test_verify_cannot_draw_from_what_is_not_published(spec: JobSpec) -> None:
    run(replace(spec, runtime=replace(spec.runtime, shard="1/2")))
    assert "not-reproduced" in {defect.kind for defect in verify(spec.out, regenerate_n=1).defects}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_engine_makes_them_again_by_the_command(
    dtype: str, tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    sweep = {"sweep": {"sampler": ["ddim", "euler_a", "dpmpp_2m"], "num_inference_steps": [2, 3]}}
    spec = job_spec(tiny_model, manifest(2), tmp_path / "out", chunk_size=5, batch_size=3, watermark="dwtDct", **sweep)
    spec = replace(spec, width=256, height=256, dtype=dtype)
    assert run(spec, engine_factory=load_engine).exit_code == 0
    runner = CliRunner()
    answer = runner.invoke(app, ["regenerate", spec.out, "--sample", "0:12", "--quiet"])
    assert (answer.exit_code, answer.output) == (0, "")
    answer = runner.invoke(app, ["regenerate", spec.out, "--sample", "0,5", "--batch-size", "1"])
    assert answer.exit_code == 0
    assert "close; max" in answer.stdout or "identical" in answer.stdout
    answer = runner.invoke(app, ["verify", spec.out, "--regenerate", "3"])
    assert (answer.exit_code, "3 samples drawn by seed 42: 3 identical" in answer.stdout) == (0, True)
