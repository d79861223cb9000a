"""The text encoder of latent diffusion's text-to-image models: a transformer trained with them.

arXiv:2112.10752, appendix E.2.1. BERT's vocabulary, but not its weights or layers: the norms come first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.loading.config import Json
from latentmill.engine.networks.attention import attend
from latentmill.engine.networks.embedding import Embedding
from latentmill.engine.types import EngineError


class BertAttention(nn.Module):
    """Self-attention over `(n, l, dim)`; the heads may be wider than the model. No mask: padding counts too."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class BertLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and with a residual."""

    def __init__(self, dim: int, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = BertAttention(dim, heads, head_dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))


class LdmBert(nn.Module):
    """Token ids `(n, l)` -> states `(n, l, d_model)`. Built from the config of diffusers' `LDMBertModel`."""

    def __init__(self, config: Json) -> None:
        super().__init__()
        if config.get("activation_function", "gelu") != "gelu":
            raise EngineError(f"bert/config.json has activation_function={config['activation_function']!r}, not gelu")
        dim = config["d_model"]
        heads, head_dim = config.get("encoder_attention_heads", 8), config.get("head_dim", 64)
        self.token_embedding = Embedding(config.get("vocab_size", 30522), dim)
        self.position_embedding = Embedding(config.get("max_position_embeddings", 77), dim)
        self.layers = nn.ModuleList(
            [
                BertLayer(dim, config.get("encoder_ffn_dim", 5120), heads, head_dim)
                for _ in range(config.get("encoder_layers", 32))
            ]
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
