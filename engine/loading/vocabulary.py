"""A tokenizer's folder: which of its files can change a token."""

from __future__ import annotations

from pathlib import Path

from latentmill.engine.loading.files import check_regular, read_json, shown
from latentmill.engine.types import EngineError

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
"""All that transformers reads of the folder of a CLIP, BERT or T5 tokenizer: the last four in place of a vocabulary."""

_REDIRECTING = ("vocab", "merges", "tokenizer_object", "fast_tokenizer_files", "gguf_file", "init_inputs")
"""Entries of tokenizer_config.json by which transformers takes the vocabulary from elsewhere."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder that can change a token.

    Raises EngineError if there is no vocabulary, or if the config takes it from another file.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise EngineError(f"{folder} is missing or empty: looked for {', '.join(TOKENIZER_FILES)}")
    for path in files:
        check_regular(path)
    check_tokenizer_config(folder / "tokenizer_config.json")
    return files


def check_tokenizer_config(path: Path) -> None:
    """Raises EngineError for a tokenizer_config.json that names other files; it need not be there."""
    config = read_json(path) if path.exists() else {}
    for name in _REDIRECTING:
        if config.get(name):
            raise EngineError(
                f"{path} has {name}={shown(config[name])}, so that a file would count that is not in the model's "
                f"digest; remove the entry, and call the file tokenizer.json"
            )
