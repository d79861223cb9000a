"""Prompts become the tokens that transformers makes of them, whichever library reads the folder."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from latentmill.engine import EngineError
from latentmill.engine.families.clip import ClipEncoder
from latentmill.engine.text.tokenizer import load_prompt_tokenizer

FOLDER = Path(__file__).parents[2] / "engine/embedded/tokenizer"
ENCODER = ClipEncoder(component="text_encoder", tokenizer="tokenizer")
LETTERS = [chr(code) for code in (*range(9, 14), *range(32, 127), *range(160, 900), 0x301, 0x200B, 0x4E2D, 0x1F600)]


def texts() -> list[str]:
    draw = random.Random(1)
    words = ["a", "red", "circle,", "{left}", "(blue:1.2)", "squares;", "it's", "<lora:x>", "24", "<|endoftext|>"]
    return [
        "",
        "x" * 3000,
        *(" ".join(draw.choices(words, k=9)) for _ in range(100)),
        *("".join(draw.choices(LETTERS, k=draw.randint(0, 40))) for _ in range(400)),
    ]


@pytest.mark.parametrize("missing", [[], ["tokenizer.json"], ["tokenizer_config.json"]], ids=str)
def test_tokens_and_marks_are_those_of_transformers(tmp_path, missing):
    folder = shutil.copytree(FOLDER, tmp_path / "tokenizer")
    for name in missing:
        (folder / name).unlink()
    ours = load_prompt_tokenizer(folder, ENCODER)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    assert ours.ids(texts()) == theirs(texts(), add_special_tokens=False, verbose=False)["input_ids"]
    assert ours.vocabulary == len(theirs)
    assert ours.framed([5, 6], 5, None) == [theirs.bos_token_id, 5, 6, theirs.eos_token_id, theirs.pad_token_id]


def test_a_mark_that_is_no_token_is_refused(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "tokenizer")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": {"content": "<nothing>"}}))
    with pytest.raises(EngineError, match=r"<nothing>.* are not all in its vocabulary"):
        load_prompt_tokenizer(folder, ENCODER)


def test_the_embedded_model_loads_without_what_takes_seconds_to_import():
    script = (
        "from latentmill.engine import Engine, ModelSpec; import sys\n"
        f"Engine.load(ModelSpec(model={str(FOLDER.parent)!r}, safety='none'), device='cpu', dtype='float32')\n"
        "print(*sorted(set(sys.modules) & {'transformers', 'torch._dynamo', 'scipy', 'sympy', 'ray', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
