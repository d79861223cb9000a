"""Original checkpoints in one file: recognised by their keys, read in full, drawn as the reference draws them."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file

from latentmill.engine import Engine, EngineError, ModelSpec, describe_model, load_tokenizer
from tests.engine.families import (
    assert_same_pictures,
    assert_same_unet,
    bert_tokenizer,
    reference_pictures,
    requests,
    write_sd1,
    write_sd2,
    write_sdxl,
)
from tests.engine.originals import write_ckpt, write_safetensors

WRITERS = {"sd1": write_sd1, "sd2": write_sd2, "sdxl": write_sdxl}
PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    return {name: write_safetensors(folder, root / f"{name}.safetensors") for name, folder in folders.items()}


def spec(file: Path, folder: Path, **changes: str) -> ModelSpec:
    if folder.name == "sd2":
        changes = {"prediction_type": "v_prediction", **changes}
    return ModelSpec(model=str(file), tokenizer=str(folder), safety="none", **changes)


def load(model: ModelSpec) -> Engine:
    return Engine.load(model, device="cpu", dtype="float32", batch_size=4)


def pictures(engine: Engine, rows) -> np.ndarray:
    return np.stack([result.pixels for result in engine.generate(rows)])


def reference(file: Path, folder: Path) -> DiffusionPipeline:
    pipeline = PIPELINES[folder.name].from_single_file(file, config=str(folder), local_files_only=True)
    pipeline.safety_checker = None
    own = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.scheduler = own
    return pipeline


@pytest.mark.parametrize("name", WRITERS)
def test_pictures_equal_those_of_the_references_own_single_file_loader(name, files, folders):
    rows = requests(32)
    engine, pipeline = load(spec(files[name], folders[name])), reference(files[name], folders[name])
    assert_same_unet(engine, pipeline)
    assert_same_pictures(pictures(engine, rows), reference_pictures(pipeline, rows))


@pytest.mark.parametrize("name", WRITERS)
def test_a_single_file_is_described_as_the_folder_that_it_came_from(name, files, folders):
    found, expected = describe_model(spec(files[name], folders[name])), describe_model(folders[name])
    for part in ("channels", "heads", "transformer_layers", "cross_attention", "linear_projection"):
        assert getattr(found.layout.blueprint.unet, part) == getattr(expected.layout.blueprint.unet, part)
    assert found.layout.blueprint.vae.channels == expected.layout.blueprint.vae.channels
    assert found.layout.blueprint.vae.scaling_factor == expected.layout.blueprint.vae.scaling_factor
    for ours, theirs in zip(found.layout.blueprint.encoders, expected.layout.blueprint.encoders, strict=True):
        assert (ours.component, ours.penultimate, ours.projection) == (
            theirs.component,
            theirs.penultimate,
            theirs.projection,
        )
        assert {key: theirs.config[key] for key in ours.config if key != "pad_token_id"} == {
            key: value for key, value in ours.config.items() if key != "pad_token_id"
        }
    assert (found.family, found.prediction_type) == (expected.family, expected.prediction_type)
    assert (found.name, found.factor, found.max_tokens) == (name, expected.factor, 77)
    assert {f"{name}.safetensors", "tokenizer/tokenizer.json"} <= set(found.files)
    assert load_tokenizer(spec(files[name], folders[name])).count(["abc"]) == [3]


def test_a_ckpt_with_a_trainings_leftovers_holds_the_same_model(files, folders, tmp_path):
    rows = requests(32, steps=2)
    file = write_ckpt(folders["sd1"], tmp_path / "model.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=True)
    expected = pictures(load(spec(files["sd1"], folders["sd1"])), rows)
    assert np.array_equal(pictures(load(spec(file, folders["sd1"])), rows), expected)


def test_fp16_weights_run_in_the_dtype_that_is_asked_for(folders, tmp_path):
    safetensors = write_safetensors(folders["sd1"], tmp_path / "half.safetensors", torch.float16)
    ckpt = write_ckpt(folders["sd1"], tmp_path / "half.ckpt", torch.float16)
    engines = [load(spec(file, folders["sd1"])) for file in (safetensors, ckpt)]
    whole = load(ModelSpec(model=str(folders["sd1"]), safety="none"))._models.denoiser.state_dict()
    for engine in engines:
        for key, tensor in engine._models.denoiser.state_dict().items():
            assert torch.equal(tensor, whole[key].half().float())


def edited(files: dict[str, Path], name: str, path: Path, edit) -> Path:
    weights = load_file(files[name])
    edit(weights)
    save_file(weights, path)
    return path


CONV = "model.diffusion_model.input_blocks.0.0.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop(CONV), f"1 keys missing .first: .'{CONV}'"),
        (lambda weights: weights.update(stray=torch.zeros(1)), "1 unexpected .first: .'stray'"),
        (lambda weights: weights.update({CONV: torch.zeros(3)}), f"{CONV} has shape .3,."),
        (lambda weights: weights.update(scale_factor=torch.ones(())), "unexpected .first: .'scale_factor'"),
    ],
    ids=["missing", "stray", "shape", "scale"],
)
def test_every_key_is_claimed_or_ignored_by_name(files, folders, tmp_path, edit, message):
    file = edited(files, "sd1", tmp_path / "edited.safetensors", edit)
    with pytest.raises(EngineError, match=message):
        load(spec(file, folders["sd1"]))


def test_what_is_not_a_known_checkpoint_is_refused_with_what_was_looked_for(folders, tmp_path):
    save_file({"lora_unet_down.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(EngineError, match=r"1 tensors, first 'lora_unet_down.alpha'.*input_blocks.0.0.weight"):
        describe_model(spec(tmp_path / "lora.safetensors", folders["sd1"]))
    refiner = {"conditioner.embedders.0.model.token_embedding.weight": torch.ones(1)}
    save_file(refiner, tmp_path / "refiner.safetensors")
    with pytest.raises(EngineError, match="refiner"):
        describe_model(spec(tmp_path / "refiner.safetensors", folders["sd1"]))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(EngineError, match=r"read from .safetensors, .ckpt"):
        describe_model(spec(tmp_path / "notes.txt", folders["sd1"]))


def test_an_inpainting_model_is_refused(files, folders, tmp_path):
    def widen(weights):
        key = "model.diffusion_model.input_blocks.0.0.weight"
        weights[key] = torch.zeros(len(weights[key]), 9, 3, 3)

    file = edited(files, "sd1", tmp_path / "inpainting.safetensors", widen)
    with pytest.raises(EngineError, match="inpainting U-Net, which takes 9 channels"):
        describe_model(spec(file, folders["sd1"]))


def test_stable_diffusion_2_must_be_told_what_it_predicts(files, folders, tmp_path):
    silent = ModelSpec(model=str(files["sd2"]), tokenizer=str(folders["sd2"]))
    with pytest.raises(EngineError, match="give prediction_type: v_prediction for a 768-v model"):
        describe_model(silent)
    with pytest.raises(EngineError, match="prediction_type='noise'"):
        describe_model(dataclasses.replace(silent, prediction_type="noise"))
    marked = tmp_path / "marked.safetensors"
    save_file(load_file(files["sd2"]), marked, {"modelspec.prediction_type": "v"})
    assert describe_model(dataclasses.replace(silent, model=str(marked))).prediction_type == "v_prediction"


def test_the_marks_of_fine_tuned_models_are_read(files, folders, tmp_path):
    def mark(weights):
        weights.update(v_pred=torch.zeros(0), ztsnr=torch.zeros(0))

    file = edited(files, "sdxl", tmp_path / "marked.safetensors", mark)
    scheduler = load(spec(file, folders["sdxl"])).description.layout.blueprint.scheduler
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == ("v_prediction", True)
    plain = describe_model(spec(files["sdxl"], folders["sdxl"])).layout.blueprint.scheduler
    assert (plain.prediction_type, plain.rescale_betas_zero_snr) == ("epsilon", False)


def test_without_its_vocabulary_a_single_file_says_where_to_get_one(files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match=r"openai/clip-vit-large-patch14 .* vocab.json.*hf download.*local copy"):
        describe_model(ModelSpec(model=str(files["sd1"])))


def test_a_tokenizer_of_another_model_is_refused(files, folders, tmp_path):
    bert_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(EngineError, match="tokenizer"):
        load(ModelSpec(model=str(files["sd1"]), tokenizer=str(tmp_path / "tokenizer"), safety="none"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, in its Euler
@pytest.mark.parametrize(
    ("name", "sampler", "scheduler"),
    [("sd2", "euler", EulerDiscreteScheduler), ("sdxl", "euler_a", EulerAncestralDiscreteScheduler)],
    ids=["sd-turbo", "sdxl-turbo"],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_turbo_models_single_file_draws_as_the_references_loader_of_it(tmp_path, name, sampler, scheduler, steps):
    writers = {"sd2": lambda folder: write_sd2(folder, "epsilon"), "sdxl": write_sdxl}
    folder = writers[name](tmp_path / name)
    file = write_safetensors(folder, tmp_path / "turbo.safetensors")
    pipeline = reference(file, folder)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    rows = requests(32, guidance_scale=0.0, steps=steps, sampler=sampler)
    model = ModelSpec(
        model=str(file),
        tokenizer=str(folder),
        safety="none",
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )
    assert_same_pictures(pictures(load(model), rows), reference_pictures(pipeline, rows))
