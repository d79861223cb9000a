"""`clip-concepts` flags exactly what the published class flags, and passes exactly what it passes."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec
from latentmill.engine.guards.clip_concepts import ClipConcepts, concept_score
from latentmill.engine.guards.safety import load_safety_checker

CPU = torch.device("cpu")


def pictures(count: int) -> list[np.ndarray]:
    """Pictures that differ in colour and in coarse form, so that their embeddings differ."""
    rng = np.random.default_rng(5)
    coarse = [rng.integers(0, 256, (rng.integers(2, 6), rng.integers(2, 6), 3), dtype=np.uint8) for _ in range(count)]
    return [np.asarray(Image.fromarray(small).resize((96, 80), Image.Resampling.NEAREST)) for small in coarse]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random vision weights; the concepts are embeddings of real pictures, so that flags really occur."""
    model = tmp_path_factory.mktemp("clip-concepts")
    torch.manual_seed(3)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=12)).eval()
    for parameter in checker.vision_model.parameters():
        parameter.data.mul_(3)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(model / "feature_extractor")
    with torch.no_grad():
        embeds = checker.visual_projection(
            checker.vision_model(processor(pictures(20), return_tensors="pt")["pixel_values"])[1]
        )
        embeds = embeds - 0.98 * embeds.mean(0)
        checker.concept_embeds.copy_(embeds[:17])
        checker.special_care_embeds.copy_(embeds[17:20])
        checker.concept_embeds_weights.copy_(torch.linspace(0.7, 0.95, 17))
        checker.special_care_embeds_weights.copy_(torch.tensor([0.6, 0.8, 0.7]))
    checker.save_pretrained(model / "safety_checker")
    return model


def published_verdicts(folder: Path, batch: list[np.ndarray]) -> list[bool]:
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    inputs = processor([Image.fromarray(picture) for picture in batch], return_tensors="pt")["pixel_values"]
    return checker(clip_input=inputs, images=np.zeros((len(batch), 2, 2, 3)))[1]


def test_flags_and_passes_agree_with_the_published_class(folder):
    batch = pictures(120)
    expected = published_verdicts(folder, batch)
    checker = ClipConcepts(folder, CPU)
    verdicts = [checker.check(picture) for picture in batch]
    assert [verdict.flagged for verdict in verdicts] == expected
    assert 10 <= sum(expected) <= 110, "flags and passes must both occur for this to mean anything"
    assert all((verdict.score > 0) == verdict.flagged for verdict in verdicts)


def test_a_verdict_has_the_same_bits_in_any_thread(folder):
    batch, checker = pictures(40), ClipConcepts(folder, CPU)
    expected = [checker.check(picture) for picture in batch]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(checker.check, batch)) == expected


def test_special_care_makes_the_others_stricter_and_rounding_decides_at_the_edge():
    def scores(special: float, concept: float) -> float:
        return concept_score(np.float32([special, -1, -1]), np.float32([concept] + [-1] * 16), [0.5] * 3, [0.5] * 17)

    assert scores(0.4, 0.4995) <= 0
    assert scores(0.6, 0.4995) > 0
    assert scores(0.4, 0.5004) == 0
    assert scores(0.4, 0.5006) == pytest.approx(0.001)


@pytest.mark.parametrize("where", ["special", "concepts"])
def test_nan_is_flagged_where_the_published_class_would_pass_it(folder, where, monkeypatch):
    checker = ClipConcepts(folder, CPU)
    special, concepts = torch.full((1, 3), -1.0), torch.full((1, 17), -1.0)
    (special if where == "special" else concepts)[0, 1] = math.nan
    monkeypatch.setattr(checker._model, "similarities", lambda _: (special, concepts))
    verdict = checker.check(pictures(1)[0])
    assert verdict.flagged
    assert math.isnan(verdict.score)


def test_the_published_files_double_nesting_is_read(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    weights = copy / "safety_checker" / "model.safetensors"
    nested = {
        key.replace("vision_model.", "vision_model.vision_model."): value for key, value in load_file(weights).items()
    }
    nested["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(nested, weights)
    batch = pictures(20)
    assert [ClipConcepts(copy, CPU).check(p).score for p in batch] == [
        ClipConcepts(folder, CPU).check(p).score for p in batch
    ]


def test_a_checker_that_does_not_load_is_an_error(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    weights = copy / "safety_checker" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["concept_embeds"]
    save_file(tensors, weights)
    with pytest.raises(EngineError, match="concept_embeds"):
        ClipConcepts(copy, CPU)
    weights.unlink()
    with pytest.raises(EngineError, match=r"model.safetensors is missing"):
        load_safety_checker(ModelSpec(model=str(copy)), copy, CPU)


def test_a_folder_with_its_own_checker_uses_it_by_default(eps_model, folder, tmp_path):
    model = Path(shutil.copytree(eps_model, tmp_path / "model"))
    for part in ("safety_checker", "feature_extractor"):
        shutil.copytree(folder / part, model / part)
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    engine = Engine.load(ModelSpec(model=str(model)), device="cpu", dtype="float32", batch_size=2)
    request = GenerationRequest(prompt="a", width=64, height=64, num_inference_steps=2)
    assert engine.generate([request])[0].safety.checker == "clip-concepts"
    judges = {"safety_checker/model.safetensors", "safety_checker/config.json"}
    judges.add("feature_extractor/preprocessor_config.json")
    assert judges <= set(engine.description.files)
