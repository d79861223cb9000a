"""Prompts to what the U-Net is conditioned on, through one or two text encoders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.blueprint import Tower
from engine.layout import ModelLayout
from engine.tokenizer import PromptTokenizer, load_prompt_tokenizer
from engine.types import EngineError
from engine.weights import load_tower

_CACHE_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts: token states `(n, l, d)` and, where the model wants it, one pooled state per row `(n, p)`."""

    context: Tensor
    pooled: Tensor | None

    def followed_by(self, other: Conditioning) -> Conditioning:
        """These rows, then the other's."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Conditioning(torch.cat([self.context, other.context]), pooled)


@dataclass(frozen=True, slots=True)
class _LoadedTower:
    tower: Tower
    tokenizer: PromptTokenizer
    model: nn.Module

    def encode(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        ids = torch.tensor(self.tokenizer.padded_ids(texts, self.tower.max_tokens, self.tower.pad_id), device=device)
        if self.tower.kind == "ldm-bert":
            return self.model(ids), None
        output = self.model(ids, output_hidden_states=self.tower.penultimate)
        states = output.hidden_states[-2] if self.tower.penultimate else output.last_hidden_state
        return states, output.text_embeds if self.tower.kind == "clip-projection" else None


class TextEncoder:
    """The model's text encoders, frozen; their states stand side by side for each token.

    Encodes in batches of one fixed, padded size and remembers recent prompts, so that the bits of an embedding depend
    on its prompt alone.
    """

    def __init__(self, layout: ModelLayout, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        blueprint = layout.blueprint
        self._towers = [
            _LoadedTower(tower, load_prompt_tokenizer(folder, tower.kind), load_tower(layout, tower, dtype, device))
            for tower, folder in zip(blueprint.towers, layout.tokenizers, strict=True)
        ]
        for loaded in self._towers:
            if loaded.tokenizer.vocabulary > int(loaded.tower.config.get("vocab_size", 30522)):
                raise EngineError(
                    f"{loaded.tower.component} knows {loaded.tower.config.get('vocab_size')} tokens, the tokenizer has "
                    f"{loaded.tokenizer.vocabulary}: it is not the one that the model was trained with"
                )
        self._zeros_for_empty = blueprint.force_zeros_for_empty_prompt
        self.max_tokens = blueprint.max_tokens
        self._device = device
        self._batch_size = batch_size
        self._cache: dict[str, tuple[Tensor, Tensor | None]] = {}

    def at_precision(self, dtype: torch.dtype) -> TextEncoder:
        """A copy of the encoder in another dtype, with a memory of its own."""
        other = copy.copy(self)
        other._towers = [
            _LoadedTower(loaded.tower, loaded.tokenizer, copy.deepcopy(loaded.model).to(dtype))
            for loaded in self._towers
        ]
        other._cache = {}
        return other

    def count_tokens(self, text: str) -> int:
        """Tokens before truncation, without start and end marks. Raises the tokenizer's own errors."""
        return self._towers[0].tokenizer.count([text])[0]

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """`n` texts -> their conditioning in the encoders' dtype; longer texts are cut at `max_tokens`."""
        if len(self._cache) > _CACHE_LIMIT:
            self._cache.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            padded = batch + batch[:1] * (self._batch_size - len(batch))
            self._cache.update(zip(batch, self._encode_batch(padded), strict=False))
        rows = [self._cache[text] for text in texts]
        pooled = [row_pooled for _, row_pooled in rows if row_pooled is not None]
        return Conditioning(torch.stack([states for states, _ in rows]), torch.stack(pooled) if pooled else None)

    def encode_negative(self, texts: Sequence[str]) -> Conditioning:
        """As `encode`; but where the model was trained so (SDXL), no negative prompt means zeros."""
        encoded = self.encode(texts)
        if not self._zeros_for_empty:
            return encoded
        given = torch.tensor([bool(text) for text in texts], device=encoded.context.device)
        context = encoded.context * given[:, None, None]
        return Conditioning(context, None if encoded.pooled is None else encoded.pooled * given[:, None])

    def _encode_batch(self, texts: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        parts = [loaded.encode(texts, self._device) for loaded in self._towers]
        states = torch.cat([part for part, _ in parts], dim=-1)
        pooled = [part for _, part in parts if part is not None]
        return list(zip(states, pooled[0] if pooled else [None] * len(texts), strict=True))
