"""From prompts to the denoiser's conditioning, through one or more text encoders."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from latentmill.engine.acceleration import upload
from latentmill.engine.families.family import TextEncoderSpec
from latentmill.engine.loading.layout import ModelLayout
from latentmill.engine.loading.weights import load_text_encoder
from latentmill.engine.loras import Loras, RowScales, scales_of
from latentmill.engine.text.lora_tags import without_lora_tags
from latentmill.engine.text.prompts import Chunk, cut_into_chunks, parse_prompt
from latentmill.engine.text.tokenizer import PromptTokenizer, load_prompt_tokenizer
from latentmill.engine.types import LONG_PROMPTS, PROMPT_SYNTAXES, EngineError, ModelSpec

_CACHE_LIMIT = 1024
_PROMPT_LIMIT = 16_384


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts: token states `(n, l, d)` and, where the model wants it, one pooled state per row `(n, p)`."""

    context: Tensor
    pooled: Tensor | None

    def take(self, rows: list[int]) -> Conditioning:
        """Some of the rows, in this order. Stacked, as a list of indices would have to be copied to the device."""
        pooled = None if self.pooled is None else torch.stack([self.pooled[row] for row in rows])
        return Conditioning(torch.stack([self.context[row] for row in rows]), pooled)

    def followed_by(self, other: Conditioning) -> Conditioning:
        """These rows, then the other's."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Conditioning(torch.cat([self.context, other.context]), pooled)


_Key = tuple[str, int, RowScales]
"""What an embedding depends on: the text, its chunks, and the LoRAs of text encoders that count."""


@dataclass(frozen=True, slots=True)
class _LoadedEncoder:
    spec: TextEncoderSpec
    tokenizer: PromptTokenizer
    network: nn.Module

    def framed(self, chunk: Chunk) -> tuple[list[int], list[float]]:
        """A chunk's ids and weights with marks and padding, which weigh 1."""
        ids = self.tokenizer.framed([token for token, _ in chunk], self.spec.max_tokens, self.spec.pad_id)
        weights = [*[1.0] * (self.spec.marks - 1), *(weight for _, weight in chunk)]
        return ids, weights + [1.0] * (self.spec.max_tokens - len(weights))

    def encode(self, ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
        rows = upload(torch.tensor(ids), device)
        return self.spec.encode(self.network, rows)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A parsed prompt: its tokens by the encoder that takes most of them, and for each encoder its chunks."""

    tokens: int
    chunks: tuple[list[Chunk], ...]


class TextEncoder:
    """The model's text encoders, frozen; their states are concatenated for each token, or are further tokens.

    Encodes in batches of one fixed, padded size and remembers recent prompts, so that the bits of an embedding depend
    on its prompt alone.
    """

    def __init__(
        self,
        layout: ModelLayout,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        loras: Loras,
    ) -> None:
        if spec.prompt_syntax not in PROMPT_SYNTAXES or spec.long_prompts not in LONG_PROMPTS:
            raise EngineError(
                f"prompt_syntax is {spec.prompt_syntax!r} and long_prompts {spec.long_prompts!r}; expected one of "
                f"{', '.join(PROMPT_SYNTAXES)} and one of {', '.join(LONG_PROMPTS)}"
            )
        blueprint = layout.blueprint
        self._encoders = [
            _LoadedEncoder(
                encoder, load_prompt_tokenizer(folder, encoder), load_text_encoder(layout, encoder, dtype, device)
            )
            for encoder, folder in zip(blueprint.encoders, layout.tokenizers, strict=True)
        ]
        for loaded in self._encoders:
            _check_vocabulary(loaded, exact=loaded.spec.component in layout.original)
        self._syntax = spec.prompt_syntax
        self._long_prompts = spec.long_prompts
        self._zeros_for_empty = blueprint.force_zeros_for_empty_prompt
        self._limit, self._reader = blueprint.prompt_tokens, blueprint.reader
        self._width, self._empty_tokens = blueprint.denoiser.context_dim, blueprint.empty_tokens
        self._device = device
        self._batch_size = batch_size
        self._read = lru_cache(_PROMPT_LIMIT)(self._parse)
        self._cache: dict[_Key, tuple[Tensor, Tensor | None]] = {}
        self._loras = loras
        self._adapted: frozenset[str] = frozenset()

    @property
    def networks(self) -> list[nn.Module]:
        """The encoders' networks."""
        return [loaded.network for loaded in self._encoders]

    def adapted_by(self, loras: Iterable[str]) -> None:
        """From now on the networks have these LoRAs beside them: an embedding depends on their scales."""
        self._adapted = frozenset(loras)

    def without_cache(self) -> TextEncoder:
        """The same encoder with no embeddings remembered: for networks whose precision has changed."""
        other = copy.copy(self)
        other._cache = {}
        return other

    def count_tokens(self, text: str) -> int:
        """Tokens before truncation, without start and end marks and emphasis. Raises the tokenizer's own errors."""
        return self._read(text).tokens

    def chunks_needed(self, text: str) -> int:
        """Runs of the encoder that the text takes: 1, unless long prompts are chunked.

        Raises EngineError for a text that is too long where that is an error.
        """
        prompt = self._read(text)
        if self._long_prompts == "error" and prompt.tokens > self._limit:
            raise EngineError(f"the prompt has {prompt.tokens} tokens, the limit is {self._limit}; shorten it")
        return max(map(len, prompt.chunks)) if self._long_prompts == "chunk" else 1

    def encode(self, texts: Sequence[str], chunks: int = 1, loras: Sequence[RowScales] | None = None) -> Conditioning:
        """`n` texts -> their conditioning in the encoders' dtype: `chunks * max_tokens` token states each.

        Longer texts are cut; shorter ones are continued with empty chunks. `loras` are those of each row.
        """
        if len(self._cache) > _CACHE_LIMIT:
            self._cache.clear()
        scales = [tuple(pair for pair in row if pair[0] in self._adapted) for row in loras or [()] * len(texts)]
        keys = [(text, chunks, own) for text, own in zip(texts, scales, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._cache]
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            padded = batch + batch[:1] * (self._batch_size - len(batch))
            with self._loras.switchboard.holding(scales_of([own for _, _, own in padded], self._device)):
                encoded = self._encode_batch([text for text, _, _ in padded], chunks)
            self._cache.update(zip(batch, encoded, strict=False))
        rows = [self._cache[key] for key in keys]
        pooled = [row_pooled for _, row_pooled in rows if row_pooled is not None]
        return Conditioning(torch.stack([states for states, _ in rows]), torch.stack(pooled) if pooled else None)

    def encode_negative(
        self, texts: Sequence[str], chunks: int = 1, loras: Sequence[RowScales] | None = None
    ) -> Conditioning:
        """As `encode`; but for models trained that way (SDXL), an empty negative prompt means zeros."""
        encoded = self.encode(texts, chunks, loras)
        if not self._zeros_for_empty:
            return encoded
        given = torch.tensor([bool(text) for text in texts], device=encoded.context.device)
        context = encoded.context * given[:, None, None]
        return Conditioning(context, None if encoded.pooled is None else encoded.pooled * given[:, None])

    def _parse(self, text: str) -> _Prompt:
        """Parse and tokenise a prompt, whole."""
        pieces = parse_prompt(without_lora_tags(text) if self._loras.reads_tags else text, self._syntax)
        if self._long_prompts != "chunk":
            # A BREAK starts a new chunk; where there is only one, its two sides follow one another.
            pieces = [replace(piece, starts_chunk=False) for piece in pieces]
        ids = [loaded.tokenizer.ids([piece.text for piece in pieces]) for loaded in self._encoders]
        chunks = tuple(
            cut_into_chunks(pieces, piece_ids, loaded.spec.max_tokens - loaded.spec.marks)
            for loaded, piece_ids in zip(self._encoders, ids, strict=True)
        )
        return _Prompt(sum(map(len, ids[self._reader])), chunks)

    def _encode_batch(self, texts: list[str], chunks: int) -> list[tuple[Tensor, Tensor | None]]:
        """One row per text, each with its own memory: a row in the cache must not keep its whole batch alive."""
        prompts = [self._read(text) for text in texts]
        parts = [
            self._encode_chunks(loaded, [prompt.chunks[number] for prompt in prompts], chunks)
            for number, loaded in enumerate(self._encoders)
        ]
        states = self._joined([part for part, _ in parts])
        pools = [part for _, part in parts if part is not None]
        pooled = torch.cat(pools, dim=-1) if pools else None
        return [(row.clone(), None if pooled is None else pooled[number].clone()) for number, row in enumerate(states)]

    def _joined(self, states: list[Tensor]) -> Tensor:
        """`(n, l, d)`: the encoders' states side by side, or one after the other where an encoder follows.

        What is narrower than the context is filled up with zeros, as is what an encoder left out would have said.
        """
        runs: list[list[Tensor]] = [[]]
        for loaded, part in zip(self._encoders, states, strict=True):
            if loaded.spec.follows and runs[-1]:
                runs.append([])
            if loaded.spec.width:
                runs[-1].append(part)
        wide = [torch.cat(run, dim=-1) for run in runs if run]
        context = torch.cat([functional.pad(part, (0, self._width - part.shape[-1])) for part in wide], dim=1)
        return functional.pad(context, (0, 0, 0, self._empty_tokens))

    def _encode_chunks(
        self, loaded: _LoadedEncoder, rows: list[list[Chunk]], chunks: int
    ) -> tuple[Tensor, Tensor | None]:
        """Chunk by chunk, each at the fixed batch shape; the pooled state is the first chunk's."""
        states, pooled = [], []
        for number in range(chunks):
            framed = [loaded.framed(row[number] if number < len(row) else []) for row in rows]
            part, part_pooled = loaded.encode([ids for ids, _ in framed], self._device)
            states.append(_emphasised(part, [weights for _, weights in framed]))
            pooled.append(part_pooled)
        return torch.cat(states, dim=1), pooled[0]


def _check_vocabulary(loaded: _LoadedEncoder, *, exact: bool) -> None:
    """A tokenizer chosen by hand must fit exactly; one in the model's own folder may know fewer tokens."""
    known, given = int(loaded.spec.config["vocab_size"]), loaded.tokenizer.vocabulary
    if given > known or (exact and given != known and not loaded.spec.spare_tokens):
        raise EngineError(
            f"{loaded.spec.component} knows {known} tokens, the tokenizer has {given}: the model was trained with "
            "another one"
        )


def _emphasised(states: Tensor, weights: list[list[float]]) -> Tensor:
    """Token states `(n, l, d)` times their weights `(n, l)`, each row brought back to its mean, as A1111 does.

    A row whose weights are all 1 keeps its very bits.
    """
    if all(weight == 1 for row in weights for weight in row):
        return states
    factors = torch.tensor(weights, device=states.device)
    weighted = states.float() * rearrange(factors, "n l -> n l 1")
    restored = weighted * (states.float().mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True))
    plain = rearrange((factors == 1).all(dim=1), "n -> n 1 1")
    return torch.where(plain, states, restored.to(states.dtype))
