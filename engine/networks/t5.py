"""T5's encoder (arXiv:1910.10683, its version 1.1): relative positions, no biases, norms of the root mean square."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.networks.attention import attend
from latentmill.engine.networks.embedding import Embedding


class RootMeanSquareNorm(nn.Module):
    """Features over their root mean square, computed in fp32 and given in the weight's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class T5Attention(nn.Module):
    """Self-attention over `(n, l, dim)` with unscaled products and a bias by distance. No mask: padding counts too."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.heads, bias=bias, scale=1.0))


class WideLinear(nn.Linear):
    """A linear layer that works in fp32, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class T5FeedForward(nn.Module):
    """Gated GELU, whose sums overflow fp16."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)
        self.wo = WideLinear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.gelu(self.wi_0(x), approximate="tanh").float() * self.wi_1(x).float()
        return self.wo(gated)


class T5Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and with a residual, which stays in fp32."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim, eps = config["d_model"], config["layer_norm_epsilon"]
        self.attention_norm = RootMeanSquareNorm(dim, eps)
        self.attention = T5Attention(dim, config["num_heads"], config["d_kv"])
        self.feed_forward_norm = RootMeanSquareNorm(dim, eps)
        self.feed_forward = T5FeedForward(dim, config["d_ff"])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias).float()
        return x + self.feed_forward(self.feed_forward_norm(x))


class T5(nn.Module):
    """Token ids `(n, l)` -> states `(n, l, d_model)`. Built from the config of transformers' `T5EncoderModel`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.buckets: int = config["relative_attention_num_buckets"]
        self.distance: int = config["relative_attention_max_distance"]
        self.token_embedding = Embedding(config["vocab_size"], config["d_model"])
        self.position_bias = Embedding(self.buckets, config["num_heads"])
        self.layers = nn.ModuleList([T5Layer(config) for _ in range(config["num_layers"])])
        self.norm = RootMeanSquareNorm(config["d_model"], config["layer_norm_epsilon"])

    def forward(self, ids: Tensor) -> Tensor:
        bias = self.position_bias(self._buckets(ids.shape[1], ids.device))
        bias = rearrange(bias, "l m heads -> 1 heads l m")
        x = self.token_embedding(ids).float()
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    def _buckets(self, length: int, device: torch.device) -> Tensor:
        """Which bucket each pair of places has, `(l, l)`: half of them look back, and far distances share one."""
        places = torch.arange(length, device=device)
        ahead = rearrange(places, "m -> 1 m") - rearrange(places, "l -> l 1")
        half = self.buckets // 2
        exact = half // 2
        distance = ahead.abs()
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(ahead > 0, half, 0) + torch.where(distance < exact, distance, far)
