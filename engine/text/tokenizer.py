"""Prompts as token ids, and their number; without torch, so that planning can count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentmill.engine.loading.blueprint import TowerKind


class PromptTokenizer:
    """A tokenizer's folder as a counter of tokens and a maker of ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # CLIP's marks and BERT's have other names.
        self._start, self._end = (
            int(tokenizer.convert_tokens_to_ids(mark or other))
            for mark, other in (
                (tokenizer.bos_token, tokenizer.cls_token),
                (tokenizer.eos_token, tokenizer.sep_token),
            )
        )

    @property
    def vocabulary(self) -> int:
        """One more than the highest id that it gives."""
        return len(self._tokenizer)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, start and end marks not included."""
        if not texts:
            return []
        return [len(ids) for ids in self.ids(texts)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, all of them, without start and end marks."""
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        return encoded

    def framed(self, ids: Sequence[int], length: int, pad_id: int | None) -> list[int]:
        """Ids between a start and an end mark, padded to `length`; by the tokenizer's own padding for None."""
        framed = [self._start, *ids, self._end]
        return framed + [self._pad(pad_id)] * (length - len(framed))

    def padded_ids(self, texts: Sequence[str], length: int, pad_id: int | None) -> list[list[int]]:
        """Ids with start and end marks, cut and padded to `length`; by the tokenizer's own padding for None."""
        encoded = self._tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        return [ids + [self._pad(pad_id)] * (length - len(ids)) for ids in encoded]

    def _pad(self, pad_id: int | None) -> int:
        return int(self._tokenizer.pad_token_id if pad_id is None else pad_id)


def load_prompt_tokenizer(folder: Path, kind: TowerKind) -> PromptTokenizer:
    """The tokenizer in a folder, of the kind that the text encoder was trained with."""
    from transformers import BertTokenizer, CLIPTokenizer

    tokenizer = BertTokenizer if kind == "ldm-bert" else CLIPTokenizer
    return PromptTokenizer(tokenizer.from_pretrained(folder, local_files_only=True))
