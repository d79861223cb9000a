"""CLIP's kind of tokenizer (byte-level BPE, lower case, end-of-word marks) learned from the recipe's own captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from training import architecture, icons, pairs, scenes

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def captions() -> list[str]:
    """Captions of every kind that the training draws, the same list on every call."""
    rng = np.random.default_rng(7)
    found = [scenes.caption(scene, rng) for scene in scenes.split(held_out=False)]
    found += [pairs.caption(pair, rng) for pair in pairs.draw_pairs(2000, rng, held_out=False)]
    found += [icons.caption(icon, rng) for icon in icons.draw_icons(list(icons.NAMES), 4000, rng)]
    return found


def _merges(corpus: Iterable[str], size: int) -> list[tuple[str, str]]:
    """The BPE merges that `size` words leave room for, most frequent first."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix=WORD_END, show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(corpus, trainer)
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]


def build(folder: Path) -> None:
    """Learn the tokenizer and write it to `folder`, both as CLIP's two files and as `tokenizer.json`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + WORD_END for letter in alphabet)]  # so that any text at all has tokens
    known = set(words)
    merges = []
    for first, second in _merges(captions(), architecture.VOCABULARY - len(words) - 2):
        merged = first + second
        if merged not in known and len(words) < architecture.VOCABULARY - 2:
            known.add(merged)
            words.append(merged)
            merges.append((first, second))
    words += [START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=architecture.MODEL_MAX_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes tokenizer.json only; other readers of this layout want the original pair.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> CLIPTokenizer:
    """The tokenizer written by `build`."""
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """`n` texts -> (n, 77) int64, padded and cut as every reader of the model does it."""
    unique = list(dict.fromkeys(texts))
    length = architecture.MODEL_MAX_LENGTH
    ids = tokenizer(unique, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]
    place = {text: index for index, text in enumerate(unique)}
    return torch.as_tensor(ids)[torch.tensor([place[text] for text in texts])]
