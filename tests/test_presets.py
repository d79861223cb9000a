"""The presets in configs/models: pinned, whole, and usable with a local copy in the hub id's place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latentmill.engine import SAMPLERS
from latentmill.engine.loading.hub import is_hub_id
from latentmill.engine.sampling.table import FLOW_SAMPLERS
from latentmill.jobs.errors import UsageError
from latentmill.jobs.models.choice import ModelChoice, resolve_model
from latentmill.jobs.models.presets import list_presets
from tests.engine.families import write_sd2, write_sdxl
from tests.engine.originals import write_safetensors

PRESETS = list_presets()
TRANSFORMERS = {"sd3-medium", "sd35-medium", "sd35-large", "flux-dev", "flux-schnell"}
ROWS = {"sd15", "sd21", "sd21-base", "sdxl", "sd-turbo", "sdxl-turbo", "ldm-text2img-large", "ldm-vq-f4"} | TRANSFORMERS
FEW_STEPS = {"sd-turbo", "sdxl-turbo", "flux-schnell"}


def test_there_is_a_preset_for_every_family():
    assert PRESETS.keys() >= ROWS


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_preset_is_pinned_and_within_what_the_engine_takes(name):
    preset = PRESETS[name]
    assert preset.sampler in SAMPLERS
    assert (preset.num_inference_steps <= 4) == (name in FEW_STEPS) == (preset.guidance_scale == 0)
    if is_hub_id(preset.path):
        assert re.fullmatch(r"[0-9a-f]{40}", preset.revision)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_offline_a_preset_says_what_is_missing_and_from_where(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve_model(ModelChoice(source=name))
    assert PRESETS[name].path in str(caught.value)
    assert "local" in str(caught.value)
    assert PRESETS[name].revision is None or PRESETS[name].revision in str(caught.value)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_a_preset_of_flow_matching_names_a_sampler_of_it_and_says_that_it_is_gated(name):
    assert PRESETS[name].sampler in FLOW_SAMPLERS
    assert "gated on the hub" in PRESETS[name].description
    assert PRESETS[name].license


def test_a_local_folder_takes_the_hubs_place(tmp_path: Path):
    folder = write_sdxl(tmp_path / "mine")
    model, defaults, description = resolve_model(ModelChoice(source=f"sdxl={folder}"))
    assert (model.name, model.family, model.revision) == ("sdxl", "stable-diffusion-xl", None)
    assert (defaults.width, defaults.guidance_scale, defaults.sampler) == (1024, 5.0, "euler")
    assert description.path == folder


@pytest.mark.parametrize(
    ("name", "prediction_type", "spacing"),
    [("sd21", "v_prediction", "leading"), ("sd21-base", "epsilon", "leading"), ("sd-turbo", "epsilon", "trailing")],
)
def test_a_preset_tells_what_a_single_file_does_not(tmp_path, name, prediction_type, spacing):
    folder = write_sd2(tmp_path / "sd2")
    file = write_safetensors(folder, tmp_path / "model.safetensors")
    model, _, _ = resolve_model(ModelChoice(source=f"{name}={file}", tokenizer=str(folder)))
    assert (model.predicts, model.timestep_spacing or "leading") == (prediction_type, spacing)
