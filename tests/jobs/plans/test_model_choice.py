"""Which model a job runs: folders, single files, hub ids, presets with another place; and every switch reaches it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from latentmill.engine import Engine
from latentmill.jobs.errors import UsageError
from latentmill.jobs.models.choice import ModelChoice, resolve_model
from latentmill.jobs.models.presets import list_presets
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.runner import run_job
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.worker import load_engine
from tests.engine.families import write_sd1
from tests.engine.originals import write_safetensors
from tests.jobs.driver import job_spec, read_dataset

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Manifest = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd1(tmp_path_factory.mktemp("sd1") / "sd1")


@pytest.fixture(scope="module")
def single_file(folder: Path) -> Path:
    return write_safetensors(folder, folder.parent / "model.safetensors")


def drawn(model: Path | str, prompts: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """The rows of a real job."""
    settings = {"safety": "none", "chunk_size": 4, "width": 64, "height": 64, **settings}
    assert run_job(job_spec(model, prompts, out, **settings), on_progress=lambda _: None).exit_code == 0
    return read_dataset(str(out)).rows.to_pylist()


def test_a_single_file_draws_what_its_folder_draws(
    folder: Path, single_file: Path, manifest: Manifest, tmp_path: Path
) -> None:
    expected = drawn(folder, manifest(2), tmp_path / "folder")
    found = drawn(single_file, manifest(2), tmp_path / "file", tokenizer=str(folder), timestep_spacing="leading")
    assert [row["pixel_sha256"] for row in found] == [row["pixel_sha256"] for row in expected]
    model, _, _ = resolve_model(ModelChoice(source=str(single_file), tokenizer=str(folder)))
    assert (model.name, model.weights_digest) == ("model", model.files["model.safetensors"])
    assert resolve_model(ModelChoice(source=str(folder)))[0].weights_digest.isalnum()


def test_every_switch_of_the_model_reaches_the_engine(
    folder: Path, single_file: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = {"tokenizer": str(folder), "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    switches |= {"prompt_syntax": "a1111", "long_prompts": "chunk", "safety": "open-nsfw"}
    spec = job_spec(single_file, manifest(1), tmp_path / "out", nsfw_threshold=0.6, **switches)
    with draft_plan(spec) as draft:
        plan = adopt(draft, Storage.open(str(tmp_path / "out")))
    seen: dict[str, Any] = {}
    monkeypatch.setattr(Engine, "load", lambda spec, **more: seen.update(spec=spec, **more))
    load_engine(plan, "cpu")
    assert {name: getattr(seen["spec"], name) for name in switches} == switches
    assert (seen["spec"].model, seen["spec"].safety_threshold) == (str(single_file), 0.6)


def test_emphasis_changes_the_picture_only_in_its_syntax(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    def digests(syntax: str) -> list[str]:
        prompts = manifest(["a (red:1.6) cat", "a red cat"])
        rows = drawn(folder, prompts, tmp_path / syntax, prompt_syntax=syntax, sweep={"seed": [5]})
        return [row["pixel_sha256"] for row in rows] + [row["prompt_tokens"] for row in rows]

    plain, emphasised = digests("plain"), digests("a1111")
    assert plain[0] != emphasised[0]
    assert plain[1] == emphasised[1]
    assert plain[2] > emphasised[2] == emphasised[3]


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one model, on a machine that is offline."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo


@pytest.mark.usefixtures("cached")
def test_a_hub_id_is_pinned_to_the_commit_that_it_meant(folder: Path) -> None:
    model, _, described = resolve_model(ModelChoice(source="someone/tiny"))
    assert (model.source, model.revision) == ("someone/tiny", COMMIT)
    assert model.files == resolve_model(ModelChoice(source=str(folder)))[0].files
    assert (model.spec.model, model.spec.revision) == ("someone/tiny", COMMIT)
    assert described.path.name == COMMIT
    with pytest.raises(UsageError, match=r"someone/other at revision v9 is not in the cache .*local copy") as caught:
        resolve_model(ModelChoice(source="someone/other", revision="v9"))
    assert "\n" not in str(caught.value)


def test_a_preset_may_have_another_place(folder: Path) -> None:
    preset = list_presets()["embedded"]
    model, defaults, _ = resolve_model(ModelChoice(source=f"embedded={folder}"))
    assert (model.name, model.spec.model, model.source) == ("embedded", str(folder), f"embedded={folder}")
    assert (defaults.num_inference_steps, defaults.batch_size) == (preset.num_inference_steps, preset.batch_size)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (ModelChoice(source="embedde"), "neither a preset, did you mean 'embedded'?"),
        (ModelChoice(source="embedded", revision="main"), "revision 'main' has no meaning for a local model"),
        (ModelChoice(source="embedded=/nowhere"), "/nowhere does not exist"),
        (ModelChoice(source="/no/where.ckpt"), "does not exist"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(choice: ModelChoice, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_model(choice)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folders_own_checker_judges_a_job(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    torch.manual_seed(3)
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=12)
    checker = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.normal_(checker.concept_embeds)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        model / "feature_extractor"
    )
    verdicts = {}
    for name, threshold in (("all", -1.1), ("none", 1.1)):
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(1.1)
        checker.save_pretrained(model / "safety_checker")
        rows = drawn(model, manifest(2), tmp_path / name, safety="clip-concepts", on_flagged="drop")
        assert {row["nsfw_checker"] for row in rows} == {"clip-concepts"}
        verdicts[name] = [(row["status"], row["image"] is None) for row in rows]
    assert verdicts == {"all": [("flagged", True)] * 2, "none": [("ok", False)] * 2}
