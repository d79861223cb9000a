"""Prompts to the context that the U-Net attends to, through the text encoder of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from engine.describe import weights_file
from engine.types import EngineError

_CACHE_LIMIT = 1024


class TextEncoder:
    """CLIP's text tower, frozen (arXiv:2103.00020): a prompt becomes `(max_tokens, hidden)`.

    Encodes in batches of one fixed, padded size and remembers recent prompts, so that the bits of an embedding depend
    on its prompt alone.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        weights_file(folder, "text_encoder")
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        model, info = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, local_files_only=True, output_loading_info=True, use_safetensors=True
        )
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if wrong:
            raise EngineError(
                f"{folder / 'text_encoder'} does not match its config.json: {len(wrong)} keys, first {wrong[0]}"
            )
        self.model = model.to(device).eval().requires_grad_(requires_grad=False)
        self.max_tokens: int = self.model.config.max_position_embeddings
        self._batch_size = batch_size
        self._cache: dict[str, Tensor] = {}

    def at_precision(self, dtype: torch.dtype) -> TextEncoder:
        """A copy of the encoder in another dtype, with a memory of its own."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).to(dtype)
        other._cache = {}
        return other

    def count_tokens(self, text: str) -> int:
        """Tokens before truncation, without start and end marks. Raises the tokenizer's own errors."""
        return len(self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`n` texts -> `(n, max_tokens, hidden)` in the encoder's dtype; longer texts are cut at `max_tokens`."""
        if len(self._cache) > _CACHE_LIMIT:
            self._cache.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            padded = batch + batch[:1] * (self._batch_size - len(batch))
            self._cache.update(zip(batch, self._encode_batch(padded), strict=False))
        return torch.stack([self._cache[text] for text in texts])

    def _encode_batch(self, texts: list[str]) -> Tensor:
        ids = self._tokenizer(
            texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )["input_ids"]
        return torch.as_tensor(self.model(ids.to(self.model.device)).last_hidden_state)
