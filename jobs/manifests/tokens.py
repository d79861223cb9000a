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

    `negatives` are a sweep's negative prompts, which replace those of rows and the default. `refused` is the number of
    rows that are left out because they are too long. With `reads_tags`, names of LoRAs are no words.
    """

    def __init__(
        self,
        load: Callable[[], _Counts],
        *,
        syntax: str,
        limit: int | None,
        negatives: Sequence[str] = (),
        default_negative: str = "",
        reads_tags: bool = False,
    ) -> None:
        self.limit = limit
        self.refused = 0
        self._load = load
        self._syntax = syntax
        self._negatives = negatives
        self._default = default_negative
        self._reads_tags = reads_tags
        self._remembered: dict[str, int] = {}

    @cached_property
    def _tokenizer(self) -> _Counts:
        return self._load()

    def longest(self, rows: pa.RecordBatch) -> list[int]:
        """Tokens of each row's prompt, or of its negative prompt if that has more."""
        prompts = self.counts(rows.column("prompt"))
        if not self._negatives and "negative_prompt" in rows.schema.names:
            negatives = self.counts(rows.column("negative_prompt").fill_null(self._default))
        else:
            negatives = [max(self._count(self._negatives or [self._default]))] * len(rows)
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

    def count(self, text: str) -> int:
        """Tokens of one text, start and end tokens not included."""
        return self._count([text])[0]

    def counts(self, column: pa.Array) -> list[int]:
        """Tokens of each text; 0 for none."""
        texts: list[str | None] = column.to_pylist()
        counted = iter(self._count([text for text in texts if text is not None]))
        return [0 if text is None else next(counted) for text in texts]

    def _count(self, texts: Sequence[str]) -> list[int]:
        if len(self._remembered) > _REMEMBERED:
            self._remembered.clear()
        new = list(dict.fromkeys(text for text in texts if text not in self._remembered))
        read = [without_lora_tags(text) for text in new] if self._reads_tags else new
        pieces = [[piece.text for piece in parse_prompt(text, self._syntax)] for text in read]
        counts = iter(self._tokenizer.count([piece for parts in pieces for piece in parts]))
        for text, parts in zip(new, pieces, strict=True):
            self._remembered[text] = sum(next(counts) for _ in parts)
        return [self._remembered[text] for text in texts]
