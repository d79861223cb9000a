"""The pieces that transformers over text and picture share: modulation by time, joint attention, feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.networks.attention import attend
from latentmill.engine.networks.unet import TimestepEmbedding, sinusoidal_embedding

NORM_EPS = 1e-6
_TIME_FEATURES = 256
_LARGEST = 65504.0
"""The largest number of fp16."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which pairs of features are turned, each `(l, 1, head_dim) float32`."""


class Modulation(nn.Module):
    """Shifts, scales and gates by the time embedding `(n, dim)`: as many `(n, 1, dim)` as asked for."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, time: Tensor) -> Sequence[Tensor]:
        return rearrange(self.linear(F.silu(time)), "n d -> n 1 d").chunk(self.parts, dim=-1)


def normed(x: Tensor) -> Tensor:
    """A LayerNorm without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def bounded(x: Tensor) -> Tensor:
    """Within what fp16 holds, where it is fp16: the residuals of a few channels overflow it."""
    return x.clamp(-_LARGEST, _LARGEST) if x.dtype == torch.float16 else x


class TimeAndText(nn.Module):
    """Timesteps `(n,)`, the pooled prompt `(n, p)` and, for distilled models, guidance `(n,)` as one `(n, dim)`."""

    def __init__(self, dim: int, pooled_dim: int, *, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIME_FEATURES, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)
        self.guidance_embedder = TimestepEmbedding(_TIME_FEATURES, dim) if guidance else None

    def forward(self, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        time = self.timestep_embedder(sinusoidal_embedding(timesteps, _TIME_FEATURES).to(pooled.dtype))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("this network was distilled for guidance; pass it")
            # On the scale of timesteps, as the network was trained.
            angles = sinusoidal_embedding(guidance * 1000, _TIME_FEATURES)
            time = time + self.guidance_embedder(angles.to(pooled.dtype))
        return time + self.text_embedder(pooled)


class Expand(nn.Module):
    """A linear layer and GELU."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class JointFeedForward(nn.Module):
    """GELU at four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The identity keeps the published key names: net.0 and net.2, with a dropout between them in training.
        self.net = nn.Sequential(Expand(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class JointAttention(nn.Module):
    """Attention of picture and text over both together (arXiv:2403.03206, figure 2b), or of the picture over itself.

    `added` gives the text projections of its own, `text_out` a last one; `norms` is of queries and keys, for each head.
    `x (n, l, dim)`, `text (n, m, dim)` -> the same; without `out` the last projections are the caller's.
    """

    def __init__(
        self, dim: int, heads: int, *, added: bool, text_out: bool = True, norms: bool = True, out: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (_head_norm(dim // heads, norms) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)] if out else [])
        if added:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (_head_norm(dim // heads, norms) for _ in range(2))
            self.to_add_out = nn.Linear(dim, dim) if text_out else None

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Over itself."""
        queries, keys, values = self._of_picture(x)
        attended = self._attend(queries, keys, values, rotation)
        return self.to_out[0](attended) if len(self.to_out) else attended

    def join(self, x: Tensor, text: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """Over both together, the text first; the text's part is as it is where it has no last projection."""
        of_text = (
            self.norm_added_q(self._by_head(self.add_q_proj(text))),
            self.norm_added_k(self._by_head(self.add_k_proj(text))),
            self._by_head(self.add_v_proj(text)),
        )
        queries, keys, values = (torch.cat(parts, dim=1) for parts in zip(of_text, self._of_picture(x), strict=True))
        attended = self._attend(queries, keys, values, rotation)
        of_text_out, of_picture = torch.split(attended, [text.shape[1], x.shape[1]], dim=1)
        if self.to_add_out is not None:
            of_text_out = self.to_add_out(of_text_out)
        return self.to_out[0](of_picture), of_text_out

    def _of_picture(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.norm_q(self._by_head(self.to_q(x))),
            self.norm_k(self._by_head(self.to_k(x))),
            self._by_head(self.to_v(x)),
        )

    def _by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "n l (heads d) -> n l heads d", heads=self.heads)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None) -> Tensor:
        if rotation is not None:
            queries, keys = rotated(queries, rotation), rotated(keys, rotation)
        q, k, v = (rearrange(part, "n l heads d -> n l (heads d)") for part in (queries, keys, values))
        return attend(q, k, v, self.heads)


class JointBlock(nn.Module):
    """Attention of picture and text over both, and a feed-forward each; `last` gives no text.

    With `dual` attention the picture also attends to itself alone (MMDiT-X).
    """

    def __init__(self, dim: int, heads: int, *, norms: bool = True, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, added=True, text_out=not last, norms=norms)
        self.attn2 = JointAttention(dim, heads, added=False, norms=norms) if dual else None
        self.ff = JointFeedForward(dim)
        self.ff_context = None if last else JointFeedForward(dim)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *own = self.norm1(time)
        of_text = self.norm1_context(time)
        # The last block's come the other way round.
        text_shift, text_scale = reversed(of_text) if self.last else of_text[:2]
        still = normed(x)
        attended, text_attended = self.attn.join(
            still * (1 + scale) + shift, normed(text) * (1 + text_scale) + text_shift, rotation
        )
        x = x + gate * attended
        if self.attn2 is not None:
            own_shift, own_scale, own_gate = own
            x = x + own_gate * self.attn2(still * (1 + own_scale) + own_shift)
        x = x + ff_gate * self.ff(normed(x) * (1 + ff_scale) + ff_shift)
        if self.ff_context is not None:
            _, _, gate, ff_shift, ff_scale, ff_gate = of_text
            text = text + gate * text_attended
            text = bounded(text + ff_gate * self.ff_context(normed(text) * (1 + ff_scale) + ff_shift))
        return x, text


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Neighbouring features of `(n, l, heads, d)` turned by their place's angles (arXiv:2104.09864, eq. 34)."""
    cosines, sines = rotation
    real, imaginary = rearrange(x.float(), "n l heads (d two) -> two n l heads d", two=2)
    turned = rearrange([-imaginary, real], "two n l heads d -> n l heads (d two)")
    return (x.float() * cosines + turned * sines).to(x.dtype)


def _head_norm(dim: int, norms: bool) -> nn.Module:
    return nn.RMSNorm(dim, eps=NORM_EPS) if norms else nn.Identity()
