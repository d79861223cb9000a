"""Jobs with LoRAs: scales by flag, column, prompt and axis; what plan and rows say of them; resume, verify, repair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.job_file import resolve
from latentmill.jobs.ledger.pictures import pixel_sha256
from latentmill.jobs.manifests.fields import FieldError
from latentmill.jobs.manifests.loras import format_scales, parse_loras, parse_scales
from latentmill.jobs.manifests.row_loras import RowLoras
from latentmill.jobs.models.place import ModelMismatchError, place_model
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans.plan import draft_plan
from latentmill.jobs.recipe import recipe_of
from latentmill.jobs.runner import run_job
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.submission.places import visible_to_nodes
from latentmill.jobs.submission.portable import portable_job_file
from tests.engine.loras import random_terms, write_kohya
from tests.harness.models import write_tiny_model
from tests.jobs.driver import job_spec, read_dataset

pytestmark = pytest.mark.slow

Manifest = Callable[..., Path]


@pytest.fixture(scope="module")
def loras(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    text = CLIPTextModel.from_pretrained(tiny_model / "text_encoder")
    return {
        "ink": write_kohya(folder / "ink.safetensors", {"lora_unet": random_terms(unet, 1)}),
        "clay": write_kohya(folder / "clay.safetensors", {"lora_te": random_terms(text, 2)}),
    }


def job(spec: JobSpec) -> list[dict[str, Any]]:
    """The rows of a real run."""
    summary = run_job(spec, on_progress=lambda _: None)
    assert (summary.exit_code, summary.failures) == (0, ())
    return read_dataset(spec.out).rows.to_pylist()


def test_a_sweep_of_scales_draws_each_and_its_rows_say_so(
    tiny_model: Path, loras: dict[str, Path], manifest: Manifest, tmp_path: Path
) -> None:
    spec = job_spec(
        tiny_model,
        manifest(2),
        tmp_path / "out",
        safety="none",
        seed=7,
        lora=[f"{name}={path}:0" for name, path in loras.items()],
        sweep={"lora.ink": [0, 0.5, 1], "lora.clay": "0,0.8", "seed": [3]},
    )
    rows = job(spec)
    assert [row["loras"] for row in rows[:6]] == [
        "", "clay:0.8", "ink:0.5", "clay:0.8,ink:0.5", "ink:1", "clay:0.8,ink:1",
    ]  # fmt: skip
    assert len({row["pixel_sha256"] for row in rows}) == 12
    plain = job(job_spec(tiny_model, manifest(2), tmp_path / "plain", safety="none", sweep={"seed": [3]}))
    assert [row["pixel_sha256"] for row in plain] == [rows[0]["pixel_sha256"], rows[6]["pixel_sha256"]]
    assert "loras" not in plain[0]
    files = json.loads(rows[0]["lora_files"])
    assert files["ink"]["place"] == str(loras["ink"])
    assert list(files["ink"]["sha256"]) == ["ink.safetensors"]
    assert verify(spec.out).defects == ()
    before = read_dataset(spec.out)
    assert run_job(spec, on_progress=lambda _: None).generated == 0
    assert read_dataset(spec.out) == before


@pytest.mark.parametrize("number", [1, 3])
def test_a_row_alone_makes_its_picture_again(
    number: int, tiny_model: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(
        'prompt,loras\na red circle,\na blue star <lora:clay:0.7>,\na cat,"ink:0.5, clay"\na dog,ink:0\n'
    )
    lora = {name: str(path) for name, path in loras.items()}
    spec = job_spec(tiny_model, prompts, tmp_path / "out", safety="none", prompt_syntax="a1111", lora=lora)
    rows = job(spec)
    assert [row["loras"] for row in rows] == ["clay:1,ink:1", "clay:0.7,ink:1", "clay:1,ink:0.5", "clay:1"]
    recipe = recipe_of(rows[number])
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) == rows[number]["pixel_sha256"]


def test_a_lora_with_one_scale_for_all_rows_is_merged_and_its_rows_say_so(
    tiny_model: Path, loras: dict[str, Path], manifest: Manifest, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"safety": "none", "lora": [f"{name}={path}:0.5" for name, path in loras.items()]}
    (row,) = job(job_spec(tiny_model, manifest(1), tmp_path / "out", **settings))
    assert row["execution_class"].endswith(", merged clay:0.5,ink:0.5")
    recipe = recipe_of(row)
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) == row["pixel_sha256"]
    one, two = job(job_spec(tiny_model, manifest(1), tmp_path / "swept", sweep={"lora.ink": [0.5, 1]}, **settings))
    assert one["execution_class"].endswith(", merged clay:0.5")
    assert one["loras"] == row["loras"] == "clay:0.5,ink:0.5"
    assert two["loras"] == "clay:0.5,ink:1"


def test_the_axis_comes_before_the_column_the_prompt_and_the_flag() -> None:
    loras = RowLoras({"a": 1.0, "b": 0.5}, "a1111")
    assert loras.of(None, "a cat", {}) == {"a": 1.0, "b": 0.5}
    assert loras.of(None, "a cat <lora:a:0.2>", {}) == {"a": 0.2, "b": 0.5}
    assert loras.of("a:0.3,b:0", "a cat <lora:a:0.2>", {}) == {"a": 0.3, "b": 0.0}
    assert loras.of("a:0.3", "a cat", {"lora.a": 0.4}) == {"a": 0.4, "b": 0.5}
    assert RowLoras({"a": 1.0}, "plain").of(None, "<lora:a:0.2>", {}) == {"a": 1.0}


def test_rows_that_name_loras_wrongly_are_rejected(tiny_model: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(
        "prompt,negative_prompt,loras\nfine,,ink:0.5\nx <lora:inc:1>,,\nx <lora:ink:a:b>,,\nx,,water\nx,,ink:99\n"
        "x,,ink:1;2\nx,<lora:ink:1>,\n"
    )
    spec = job_spec(tiny_model, prompts, tmp_path / "out", prompt_syntax="a1111", lora=[f"ink={loras['ink']}"])
    with draft_plan(spec) as draft:
        reasons = [reject.reason for _, reject in draft.rejects.first]
        assert draft.n_rows == 1
        assert draft.summary().loras == {"ink": 1.0}
    for reason, expected in zip(
        reasons,
        [
            "the job has no LoRA 'inc', did you mean 'ink'?; give --lora inc=PLACE",
            "is not <lora:NAME:SCALE>",
            "the job has no LoRA 'water'",
            "the scale of LoRA ink 99.0 is outside -20..20",
            "is not NAME:SCALE,NAME:SCALE",
            "the negative prompt names a LoRA",
        ],
        strict=True,
    ):
        assert expected in reason


def test_without_loras_a_plan_is_what_it_was(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Outputs of earlier versions are gone on with: nothing new is in identity, document or columns."""
    prompts = manifest(["a cat <lora:ink:1>", "a dog"])
    with draft_plan(job_spec(tiny_model, prompts, tmp_path / "out", prompt_syntax="a1111")) as draft:
        document = draft.document()
        assert draft.notes == ("1 prompts have <lora:...>, and the job has no LoRA: it is read as text; give --lora",)
    assert "lora" not in json.dumps([document["identity"], document["model"]])


def test_another_scale_or_file_is_another_plan(
    tiny_model: Path, loras: dict[str, Path], manifest: Manifest, tmp_path: Path
) -> None:
    file = shutil.copy(loras["ink"], tmp_path / "ink.safetensors")
    settings: dict[str, Any] = {"safety": "none"}
    spec = job_spec(tiny_model, manifest(1), tmp_path / "out", lora=[f"ink={file}:0.5"], **settings)
    job(spec)
    planned = open_job(spec.out).plan
    assert planned.settings.lora == {"ink": f"{file}:0.5"}
    with pytest.raises(OutputConflictError, match="lora"):
        job(job_spec(tiny_model, manifest(1), spec.out, lora=[f"ink={file}:0.6"], **settings))
    with pytest.raises(OutputConflictError, match="lora"):
        job(job_spec(tiny_model, manifest(1), spec.out, **settings))
    shutil.copy(loras["clay"], file)
    with pytest.raises(OutputConflictError, match=r"loras/ink/ink\.safetensors"):
        job(spec)
    with pytest.raises(ModelMismatchError, match=r"ink\.safetensors .*is not the planned file"):
        place_model(planned.model)


def test_a_lora_in_a_bucket_is_fetched_and_held_to_its_digest(
    tiny_model: Path, loras: dict[str, Path], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "cache"))
    url = "memory://bucket/loras/ink.safetensors"
    fsspec.filesystem("memory").pipe(url, loras["ink"].read_bytes())
    spec = job_spec(tiny_model, manifest(1), tmp_path / "out", safety="none", lora=[f"ink={url}:0.5"])
    (row,) = job(spec)
    assert json.loads(row["lora_files"])["ink"]["place"] == url
    local = job_spec(tiny_model, manifest(1), tmp_path / "local", safety="none", lora=[f"ink={loras['ink']}:0.5"])
    assert job(local)[0]["pixel_sha256"] == row["pixel_sha256"]


@pytest.mark.parametrize(
    ("lora", "sweep", "reason"),
    [
        (["ink=/gone.safetensors"], {}, "LoRA ink: /gone.safetensors does not exist"),
        (["ink=s3://bucket/folder"], {}, "is not a .safetensors file"),
        (["ink=https://me:secret@host/ink.safetensors"], {}, "carries a user or a query"),
        ([], {"lora.ink": [1]}, "sweep axis lora.ink: the job has no LoRA 'ink'"),
    ],
)
def test_a_job_whose_loras_are_not_there_is_refused(
    lora: list[str], sweep: dict[str, Any], reason: str, tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    spec = job_spec(tiny_model, manifest(1), tmp_path / "out", lora=lora, sweep=sweep)
    with pytest.raises(UsageError, match=reason), draft_plan(spec):
        pass


def test_a_lora_of_another_model_is_refused_before_anything_is_loaded(
    tiny_model: Path, loras: dict[str, Path], manifest: Manifest, tmp_path: Path
) -> None:
    spec = job_spec("embedded", manifest(1), tmp_path / "out", width=256, height=256, lora=[f"ink={loras['ink']}"])
    with pytest.raises(UsageError, match=r"LoRA ink|not for this model"), draft_plan(spec):
        pass


def test_scales_are_written_as_they_are_read() -> None:
    assert parse_scales(" ink:0.8, my style : -1 ,clay") == {"ink": 0.8, "my style": -1.0, "clay": 1.0}
    assert format_scales({"ink": 0.1, "b": 0.0, "a": -2.0}) == "a:-2,ink:0.1"
    assert parse_loras("lora", ["ink=/x/y.safetensors", "b=s3://bucket/b.safetensors:.5"]) == {
        "ink": "/x/y.safetensors:1",
        "b": "s3://bucket/b.safetensors:0.5",
    }
    for bad in (["ink"], ["ink="], ["a/b=x"], ["a=x", "a=y"], ["a=x:99"], 5, {"a": 3}, [f"n{i}=x" for i in range(17)]):
        with pytest.raises(FieldError):
            parse_loras("lora", bad)
    for bad in ("ink:1,ink:2", "ink:1:2:x", "ink:99", ":1"):
        with pytest.raises(FieldError):
            parse_scales(bad)


def test_another_autoencoder_is_in_plan_and_rows(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=5) / "vae"
    spec = job_spec(tiny_model, manifest(1), tmp_path / "out", safety="none", vae=str(other))
    (row,) = job(spec)
    plan = open_job(spec.out).plan
    assert (row["vae"], plan.settings.vae) == (str(other), str(other))
    assert plan.model.files["vae/config.json"]
    assert verify(spec.out).defects == ()
    recipe = recipe_of(row)
    assert pixel_sha256(recipe.draw(recipe.load("cpu"))) == row["pixel_sha256"]
    (own,) = job(job_spec(tiny_model, manifest(1), tmp_path / "own", safety="none"))
    assert "vae" not in own
    assert own["pixel_sha256"] != row["pixel_sha256"]
    with pytest.raises(OutputConflictError, match="vae/diffusion_pytorch_model"):
        job(job_spec(tiny_model, manifest(1), spec.out, safety="none"))


def test_a_tiny_decoder_draws_previews_and_rows_say_so(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    settings: dict[str, Any] = {"safety": "none", "preview_decoder": str(tmp_path / "taesd")}
    (row,) = job(job_spec(tiny_model, manifest(1), tmp_path / "out", **settings))
    assert row["preview_decoder"] == str(tmp_path / "taesd")


def test_flags_reach_job_file_and_cluster(loras: dict[str, Path], manifest: Manifest, tmp_path: Path) -> None:
    flags = {"prompts": [str(manifest(1))], "lora": [f"ink={loras['ink']}:0.5"], "sweep": ["lora.my-ink=0,1"]}
    spec = resolve(None, {**flags, "out": "s3://bucket/out"})
    assert spec.sweep == {"lora.my-ink": ["0", "1"]}
    with pytest.raises(UsageError, match=r"lora ink .* is a path of this machine"):
        visible_to_nodes(spec, shared_filesystem=False)
    shared = visible_to_nodes(spec, shared_filesystem=True)
    assert shared.lora == {"ink": f"{loras['ink']}:0.5"}
    assert f"ink: {loras['ink']}:0.5".encode() in portable_job_file(shared, ["p.txt"])
