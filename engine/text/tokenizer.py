"""Prompts as token ids, and their number. Without torch, so that planning can count."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentmill.engine.families.family import TextEncoderSpec
from latentmill.engine.loading.files import read_json, shown
from latentmill.engine.loading.vocabulary import tokenizer_files
from latentmill.engine.types import EngineError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MARKS = (("bos_token", "cls_token"), ("eos_token", "sep_token"), ("pad_token",))
"""What a config calls the marks at the start, at the end and of padding: CLIP and BERT name them differently."""


class PromptTokenizer:
    """Counts a text's tokens and gives their ids. `start`, `end` and `pad` are the ids of marks; T5 has no start."""

    def __init__(self, tokenizer: Tokenizer, *, start: int | None, end: int, pad: int) -> None:
        self._tokenizer = tokenizer
        self._start = [] if start is None else [start]
        self._end, self._pad = end, pad

    @property
    def vocabulary(self) -> int:
        """One more than the highest id."""
        return self._tokenizer.get_vocab_size()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, start and end marks not included."""
        return [len(ids) for ids in self.ids(texts)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, all of them, without start and end marks."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def framed(self, ids: Sequence[int], length: int, pad_id: int | None) -> list[int]:
        """Ids between a start mark, if any, and an end mark, padded to `length`; None pads as the tokenizer does."""
        framed = [*self._start, *ids, self._end]
        return framed + [self._pad if pad_id is None else pad_id] * (length - len(framed))


def load_prompt_tokenizer(folder: Path, encoder: TextEncoderSpec) -> PromptTokenizer:
    """The tokenizer in a folder, of the kind that the text encoder was trained with.

    Only the files that the model's digest covers are read. A tokenizer.json is a whole tokenizer and is taken as it is;
    transformers, whose import takes a second, reads what is left: a vocabulary of which only it knows the rules.
    """
    files = {file.name: file for file in tokenizer_files(folder)}
    if "tokenizer.json" in files and "tokenizer_config.json" in files:
        marks = _marks(read_json(files["tokenizer_config.json"]))
        if None not in marks[1:]:
            from tokenizers import Tokenizer

            return _prompt_tokenizer(Tokenizer.from_file(str(files["tokenizer.json"])), marks)
    import transformers

    kind = getattr(transformers, encoder.tokenizer_class)
    with tempfile.TemporaryDirectory() as listed:
        # What else lies in the folder, and what a later version of transformers may look for, changes no token.
        for name, file in files.items():
            shutil.copyfile(file, Path(listed) / name)
        loaded = kind.from_pretrained(listed, local_files_only=True)
    return _prompt_tokenizer(loaded.backend_tokenizer, _marks(loaded.special_tokens_map))


def _marks(names: Mapping[str, Any]) -> list[str | None]:
    """The marks' texts; a config may describe one by an object with its `content`."""
    found = [next((names[name] for name in kinds if names.get(name)), None) for kinds in _MARKS]
    return [mark.get("content") if isinstance(mark, Mapping) else mark for mark in found]


def _prompt_tokenizer(tokenizer: Tokenizer, marks: Sequence[str | None]) -> PromptTokenizer:
    """Raises EngineError if a mark is not in the vocabulary."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start, end, pad = (None if mark is None else tokenizer.token_to_id(mark) for mark in marks)
    if (marks[0] is not None and start is None) or end is None or pad is None:
        raise EngineError(
            f"the tokenizer's marks {shown(list(marks))} are not all in its vocabulary: "
            "name those of start, end and padding in tokenizer_config.json"
        )
    return PromptTokenizer(tokenizer, start=start, end=end, pad=pad)
