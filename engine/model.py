"""What the engine asks of a model: its own latent diffusion, or a pipeline of the library diffusers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from latentmill.engine.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures `(n, 3, h, w) float32 in [0, 1]`, which of them are finite `(n,)`, and their rows with their slots."""

    rows: list[int]
    slots: list[int]
    pictures: Tensor
    finite: Tensor


class Model(Protocol):
    """Networks that make pictures of requests, at one precision."""

    @property
    def refills(self) -> bool:
        """Whether rows may have loops of their own, and more of them than slots may be sampled in one go."""

    def batch_key(self, request: GenerationRequest) -> Hashable:
        """What the rows of a batch share beside their shape. Raises for a request that the model cannot take."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens before truncation, start and end marks not included."""

    def in_fp32(self) -> AbstractContextManager[Model]:
        """The same model in full precision; this one must not be used within the context."""

    def sample(
        self, rows: Sequence[GenerationRequest], slots: int, noise: Sequence[Tensor] | None = None
    ) -> Iterator[Drawn]:
        """Pictures of rows of one shape and batch key, each once, by passes of `slots` rows.

        Raises EngineError if one of the rows is at fault.
        """
