"""The length of prompts in tokens, as the engine counts them: brackets of the chosen syntax do not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import pyarrow as pa

from latentmill.engine import parse_prompt, without_lora_tags

_REMEMBERED = 4096


class _Counts(Protocol):
    def count(self, texts: Sequence[str]) -> list[int]: ...


class TokenCounter:
    """Counts for one job; the tokenizer is loaded when the first text is counted.

    `prompts` and `negatives` are a sweep's texts, which replace those of rows and the default. `longest_of` says what
    is about the longest text that comes of a given one, by its field: that is the one to count. `refused` is the number
    of rows that are left out because they are too long. With `reads_tags`, names of LoRAs are no words.
    """

    def __init__(
        self,
        load: Callable[[], _Counts],
        *,
        syntax: str,
        limit: int | None,
        prompts: Sequence[str] = (),
        negatives: Sequence[str] = (),
        default_negative: str = "",
        longest_of: Callable[[str, str], str] = lambda _, text: text,
        reads_tags: bool = False,
    ) -> None:
        self.limit = limit
        self.refused = 0
        self._load = load
        self._syntax = syntax
        self._prompts = prompts
        self._negatives = negatives
        self._longest_of = longest_of
        self._default = default_negative
        self._reads_tags = reads_tags
        self._remembered: dict[str, int] = {}

    @cached_property
    def _tokenizer(self) -> _Counts:
        return self._load()

    def longest(self, rows: pa.RecordBatch) -> list[int]:
        """Tokens of each row's prompt, or of its negative prompt if that has more."""
        if self._prompts:
            prompts = [max(self._count("prompt", self._prompts))] * len(rows)
        else:
            prompts = self.counts("prompt", rows.column("prompt"))
        if not self._negatives and "negative_prompt" in rows.schema.names:
            negatives = self.counts("negative_prompt", rows.column("negative_prompt").fill_null(self._default))
        else:
            negatives = [max(self._count("negative_prompt", self._negatives or [self._default]))] * len(rows)
        return list(map(max, prompts, negatives))

    def is_over(self, count: int) -> bool:
        """Whether a text of so many tokens is too long; without a known limit, none is."""
        return self.limit is not None and count > self.limit

    def fault(self, name: str, count: int) -> str | None:
        """Why a text of so many tokens is refused, or None."""
        if not self.is_over(count):
            return None
        return (
            f"{name} has {count} tokens, the limit is {self.limit}; shorten it, "
            "or use long_prompts chunk (all of it counts) or truncate (the rest is cut)"
        )

    def count(self, name: str, text: str) -> int:
        """Tokens of one text of that field, start and end tokens not included."""
        return self._count(name, [text])[0]

    def counts(self, name: str, column: pa.Array) -> list[int]:
        """Tokens of each text of that field; 0 for none."""
        texts: list[str | None] = column.to_pylist()
        counted = iter(self._count(name, [text for text in texts if text is not None]))
        return [0 if text is None else next(counted) for text in texts]

    def _count(self, name: str, given: Sequence[str]) -> list[int]:
        texts = [self._longest_of(name, text) for text in given]
        if len(self._remembered) > _REMEMBERED:
            self._remembered.clear()
        new = list(dict.fromkeys(text for text in texts if text not in self._remembered))
        read = [without_lora_tags(text) for text in new] if self._reads_tags else new
        pieces = [[piece.text for piece in parse_prompt(text, self._syntax)] for text in read]
        counts = iter(self._tokenizer.count([piece for parts in pieces for piece in parts]))
        for text, parts in zip(new, pieces, strict=True):
            self._remembered[text] = sum(next(counts) for _ in parts)
        return [self._remembered[text] for text in texts]
