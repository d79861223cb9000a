"""Tables of embeddings, for every network that has one."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """A table of embeddings that waits for its weights."""

    def reset_parameters(self) -> None:
        """Draw no random ones: on the meta device torch would import its compiler for it, a second in each process."""
