"""CLIP's text encoder (arXiv:2103.00020, section 2.4): a causal transformer whose norms come first.

The names of its layers are those of transformers' `CLIPTextModel`, which the tests hold it to. Importing that one takes
longer than importing torch, in every process that has a model: see docs/performance.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.loading.config import Json
from latentmill.engine.networks.attention import attend
from latentmill.engine.networks.embedding import Embedding

_HIGHEST_TOKEN = 2
"""The `eos_token_id` of configs that were written with a wrong one: the end mark is then the token of highest id."""


class ClipEmbeddings(nn.Module):
    """Token ids `(n, l)` -> `(n, l, dim)`, places included."""

    def __init__(self, config: Json) -> None:
        super().__init__()
        self.token_embedding = Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = Embedding(config["max_position_embeddings"], config["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipAttention(nn.Module):
    """Self-attention over `(n, l, dim)`, each token over those up to itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class ClipFeedForward(nn.Module):
    """`(n, l, dim)` -> the same; `quick_gelu` is the first CLIP's approximation, a sigmoid of 1.702 x."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.quick = activation == "quick_gelu"
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class ClipLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and with a residual."""

    def __init__(self, config: Json) -> None:
        super().__init__()
        dim, epsilon = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1 = nn.LayerNorm(dim, eps=epsilon)
        self.self_attn = ClipAttention(dim, config["num_attention_heads"])
        self.layer_norm2 = nn.LayerNorm(dim, eps=epsilon)
        self.mlp = ClipFeedForward(dim, config["intermediate_size"], config["hidden_act"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipLayers(nn.Module):
    """The layers one after the other: `(n, l, dim)` -> the states after the last and before it."""

    def __init__(self, config: Json) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ClipLayer(config) for _ in range(config["num_hidden_layers"])])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return x, before


class ClipTextNetwork(nn.Module):
    """Token ids `(n, l)` -> states `(n, l, dim)` and, if it `pools`, one pooled state `(n, p)` per row.

    `penultimate` takes the states before the last layer, without the final norm. The pooled state is that of the last
    layer at the end mark, through a projection if it `projects`.
    """

    def __init__(self, config: Json, *, penultimate: bool, pools: bool, projects: bool) -> None:
        super().__init__()
        dim = config["hidden_size"]
        self.penultimate, self.pools = penultimate, pools
        self.end = config["eos_token_id"]
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipLayers(config)
        self.final_layer_norm = nn.LayerNorm(dim, eps=config["layer_norm_eps"])
        self.text_projection = nn.Linear(dim, config["projection_dim"], bias=False) if projects else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        last, before = self.encoder(self.embeddings(ids))
        last = self.final_layer_norm(last)
        return before if self.penultimate else last, self._pooled(last, ids) if self.pools else None

    def _pooled(self, states: Tensor, ids: Tensor) -> Tensor:
        """The states `(n, dim)` at each row's first end mark."""
        ends = ids.argmax(dim=1) if self.end == _HIGHEST_TOKEN else (ids == self.end).int().argmax(dim=1)
        pooled = states[torch.arange(len(ids), device=ids.device), ends]
        return pooled if self.text_projection is None else self.text_projection(pooled)
