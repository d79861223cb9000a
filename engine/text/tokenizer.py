"""Prompts as token ids, and their number. Without torch, so that planning can count."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentmill.engine.families.family import TextEncoderSpec
from latentmill.engine.loading.vocabulary import tokenizer_files


class PromptTokenizer:
    """Counts a text's tokens and gives their ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # CLIP and BERT name their marks differently; T5 has no start mark.
        self._start, self._end = (
            [int(tokenizer.convert_tokens_to_ids(mark or other))] if mark or other else []
            for mark, other in (
                (tokenizer.bos_token, tokenizer.cls_token),
                (tokenizer.eos_token, tokenizer.sep_token),
            )
        )

    @property
    def vocabulary(self) -> int:
        """One more than the highest id."""
        return len(self._tokenizer)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, start and end marks not included."""
        return [len(ids) for ids in self.ids(texts)] if texts else []

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, all of them, without start and end marks."""
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        return encoded

    def framed(self, ids: Sequence[int], length: int, pad_id: int | None) -> list[int]:
        """Ids between a start mark, if any, and an end mark, padded to `length`; None pads as the tokenizer does."""
        framed = [*self._start, *ids, *self._end]
        pad = self._tokenizer.pad_token_id if pad_id is None else pad_id
        return framed + [int(pad)] * (length - len(framed))


def load_prompt_tokenizer(folder: Path, encoder: TextEncoderSpec) -> PromptTokenizer:
    """The tokenizer in a folder, of the kind that the text encoder was trained with.

    It is given a folder with the files that the model's digest covers, and no others: what else lies there, and what a
    later version of transformers may look for, changes no token.
    """
    import transformers

    tokenizer = getattr(transformers, encoder.tokenizer_class)
    with tempfile.TemporaryDirectory() as listed:
        for file in tokenizer_files(folder):
            shutil.copyfile(file, Path(listed) / file.name)
        return PromptTokenizer(tokenizer.from_pretrained(listed, local_files_only=True))
