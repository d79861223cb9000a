"""The CLIP scorer gives what transformers itself computes, from any folder of safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentmill
from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.outputs.score import score
from latentmill.jobs.scores.clip import Clip
from latentmill.jobs.scores.spec import ScoreSpec, make_score_spec
from tests.harness.models import build_tokenizer
from tests.jobs.driver import job_spec, run


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP model of random weights and small widths, written by transformers."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 24, "projection_dim": 16}
    text |= {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def spec(folder: Path) -> ScoreSpec:
    return make_score_spec({"clip_model": str(folder), "device": "cpu"})


def pictures(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (48, 40 + 8 * number, 3), dtype=np.uint8) for number in range(count)]


def test_the_score_is_the_cosine_that_the_model_itself_computes(folder: Path):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    prompts = ["a red circle", "", "a blue square " * 20]
    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    images = CLIPImageProcessorPil.from_pretrained(folder)(
        images=list(map(Image.fromarray, pictures(3))), return_tensors="pt"
    )
    with torch.inference_mode():
        expected = (model(**tokens, **images).logits_per_image / model.logit_scale.exp()).diagonal().tolist()
    found = Clip.load(spec(folder)).score(pictures(3), prompts)["clip_score"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in found}) == 3


def test_a_prompts_neighbours_do_not_change_its_score(folder: Path):
    scorer, prompts = Clip.load(spec(folder)), ["one", "two and more words", "three"]
    forth = scorer.score(pictures(3), prompts)["clip_score"]
    assert scorer.score(pictures(3)[::-1], prompts[::-1])["clip_score"][::-1] == forth


def test_a_dataset_is_scored_and_scores_of_another_model_are_refused(
    folder: Path, tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path
):
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(["one", "some nsfw", "three"]), out))
    score(out, ["clip", "phash"], spec(folder))
    values = latentmill.open_dataset(out).table(["clip_score"]).column("clip_score").to_pylist()
    assert values[1] is None
    assert all(-1 <= value <= 1 for value in (values[0], values[2]))
    other = write_clip(tmp_path / "other", seed=1)
    with pytest.raises(OutputConflictError, match=r"scores/clip is of version 1, model [0-9a-f]{16}, and"):
        score(out, ["clip"], spec(other))


@pytest.mark.parametrize(("lost", "why"), [("model.safetensors", "model.safetensors"), ("config.json", "config.json")])
def test_what_is_no_model_of_safetensors_is_refused_in_one_line(folder: Path, tmp_path: Path, lost: str, why: str):
    copy = write_clip(tmp_path / "copy")
    if lost == "model.safetensors":
        from safetensors.torch import load_file

        torch.save(load_file(copy / lost), copy / "pytorch_model.bin")
    (copy / lost).unlink()
    with pytest.raises(UsageError, match=rf"is no CLIP model that can be loaded on cpu: .*{why}"):
        Clip.load(spec(copy))


def test_weights_that_lack_a_part_are_refused_and_not_drawn_at_random(folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    copy = write_clip(tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 tensors, first text_projection\.weight"):
        Clip.load(spec(copy))


def test_without_a_model_it_says_what_to_give():
    with pytest.raises(UsageError, match="give --clip-model"):
        Clip.load(ScoreSpec())
