"""Nothing that can change a pixel or a verdict is outside a model's digest: each file of a folder in turn proves it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from latentmill.engine import Engine, EngineError, GenerationRequest, ModelSpec, describe_model
from tests.engine.diffusers_models import write_flux, write_pixart
from tests.engine.families import write_ldm, write_sdxl
from tests.harness.models import write_model

pytestmark = [
    pytest.mark.slow,
    # diffusers' own, in its solver
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

ADDED = json.dumps({"a red": 300, "cat</w>": 5})
EXTRA = {
    "added_tokens.json": ADDED,
    "special_tokens_map.json": json.dumps({"pad_token": "!", "unk_token": "a"}),
    "tokenizer_config.json": json.dumps({"pad_token": "!", "model_max_length": 9}),
    "tokenizer.5.0.0.json": "{}",
    "tokenizer.model": "x",
    "tekken.json": "{}",
    "tiktoken.model": "x",
    "vocab.txt": "a\nred\ncat\n",
    "vocab.json": "{}",
    "merges.txt": "r e\n",
    "chat_template.jinja": "{{ messages }}",
    "config.json": json.dumps({"model_type": "mistral", "vocab_size": 7}),
    "adapter_config.json": "{}",
    "generation_config.json": json.dumps({"do_sample": True}),
    "preprocessor_config.json": json.dumps({"size": 5}),
    "scheduler_config.json": json.dumps({"beta_end": 0.5}),
    "model.safetensors.index.json": "{}",
    "README.md": "read me",
}


def write_checked(folder: Path) -> Path:
    """With a safety checker and its image processor, which the pipeline's index does not name."""
    write_model(folder)
    torch.manual_seed(3)
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=12)).save_pretrained(
        folder / "safety_checker"
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "feature_extractor")
    return folder


WRITERS = {"sd1": write_checked, "sdxl": write_sdxl, "ldm": write_ldm, "flux": write_flux, "pixart": write_pixart}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("digests")
    return {name: write(root / name) for name, write in WRITERS.items()}


def outcome(folder: Path) -> tuple[np.ndarray, float | None]:
    """A picture and its verdict."""
    engine = Engine.load(
        ModelSpec(model=str(folder), safety="auto" if (folder / "safety_checker").is_dir() else "none"),
        device="cpu",
        dtype="float32",
        batch_size=1,
    )
    width, height = (64, 64) if engine.description.pipeline is None else engine.description.default_size
    request = GenerationRequest(
        prompt="a red cat",
        width=width,
        height=height,
        num_inference_steps=1,
        guidance_scale=2.0,
        sampler=engine.description.samplers[0],
    )
    (result,) = engine.generate([request])
    assert result.pixels is not None, result.error
    assert result.safety is not None
    return result.pixels, result.safety.score


def digest(folder: Path) -> Any:
    """The model's files by their digests, or the line by which the folder is refused."""
    try:
        return describe_model(folder).files
    except EngineError as error:
        return str(error)


def is_listed(folder: Path, path: Path) -> bool:
    """Whether the digest covers a file that was added, or the folder is refused with it."""
    try:
        return path in describe_model(folder).paths.values()
    except EngineError:
        return True


def is_seen_or_harmless(folder: Path, before: Any, expected: Any) -> bool:
    if digest(folder) != before:
        return True
    found = outcome(folder)
    return np.array_equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("name", WRITERS)
def test_each_file_that_is_altered_or_taken_away_is_in_the_digest_or_changes_nothing(name, folders, tmp_path):
    folder = Path(shutil.copytree(folders[name], tmp_path / "model"))
    before, expected = digest(folder), outcome(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for changed in (data[:-1] + bytes([data[-1] ^ 1]), None):
            path.unlink() if changed is None else path.write_bytes(changed)
            assert is_seen_or_harmless(folder, before, expected), (path, changed is None)
            path.write_bytes(data)
    assert digest(folder) == before


@pytest.mark.parametrize("name", WRITERS)
def test_each_file_that_is_added_is_in_the_digest_or_changes_nothing(name, folders, tmp_path):
    folder = Path(shutil.copytree(folders[name], tmp_path / "model"))
    before, expected = digest(folder), outcome(folder)
    unseen = []
    for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for extra, text in EXTRA.items():
            if (part / extra).exists():
                continue
            (part / extra).write_text(text)
            if not is_listed(folder, part / extra):
                unseen.append(part / extra)
            else:
                (part / extra).unlink()
    # What is not in the digest changes nothing, not even all of it together.
    assert unseen
    assert is_seen_or_harmless(folder, before, expected), unseen


_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


@pytest.mark.parametrize("name", WRITERS)
def test_no_file_is_opened_that_is_not_in_the_digest(name, folders):
    """What Python opens: safetensors are opened by their library, and only by the names that the loaders give it."""
    global _opened  # noqa: PLW0603 - a hook cannot be taken back
    listed = {str(path) for path in describe_model(folders[name]).paths.values()}
    sys.addaudithook(_note)
    _opened = []
    try:
        outcome(folders[name])
        opened = {path for path in _opened if path.startswith(str(folders[name]))}
    finally:
        _opened = None
    assert opened
    assert opened <= listed


@pytest.mark.parametrize("key", ["vocab", "merges", "fast_tokenizer_files", "gguf_file", "init_inputs"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_tokenizer_that_says_its_vocabulary_lies_elsewhere_is_refused(name, key, folders, tmp_path):
    folder = Path(shutil.copytree(folders[name], tmp_path / "model"))
    path = folder / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: ["tokenizer.9.json"]}))
    assert f"tokenizer_config.json has {key}=['tokenizer.9.json']" in digest(folder)


def test_a_shard_that_lies_elsewhere_is_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders["flux"], tmp_path / "model"))
    (folder / "transformer/diffusion_pytorch_model.safetensors").rename(tmp_path / "other.safetensors")
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../other.safetensors"}}))
    assert "names '../../other.safetensors': shards are .safetensors files beside it" in digest(folder)
