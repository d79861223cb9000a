"""Attention, for every network: the one place where queries meet keys."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention (arXiv:1706.03762, eq. 1) of `(n, l, heads * d)` over `(n, m, heads * d)`.

    `causal`: each query over the keys up to its own place only. `bias (1, heads, l, m)` is added to the products, times
    `scale`: by default one over the root of d.

    torch's kernels accumulate the products in fp32 for half-precision inputs, so that Stable Diffusion 2's
    `upcast_attention` needs no upcast here: as in diffusers, it would only rule out the fast kernels.
    """
    q, k, v = (rearrange(part, "n l (heads d) -> n heads l d", heads=heads) for part in (queries, keys, values))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return rearrange(attended, "n heads l d -> n l (heads d)")


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a context `(n, m, context_dim)`, each `(n, m, dim)`."""


class Attention(nn.Module):
    """Attention of `(n, length, dim)` over a context, of which it is given keys and values, or over itself."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def project(self, context: Tensor) -> KeysValues:
        """What of a context the queries meet."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        keys, values = self.project(x) if context is None else context
        return self.to_out[0](attend(self.to_q(x), keys, values, self.heads))
