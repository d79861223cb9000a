"""The pieces that the U-Net and the autoencoder share: residual blocks, transformer blocks, resampling.

Attribute names are those of the diffusers checkpoints, so that a folder's keys match ours one to one.
"""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.networks.attention import Attention, KeysValues


class ResnetBlock(nn.Module):
    """Two GroupNorm-SiLU-Conv layers with a shortcut, conditioned on time where `time_dim` is given.

    `(n, in, h, w)` and time embedding `(n, time_dim)` -> `(n, out, h, w)`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time_dim: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim is not None else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None and time is not None:
            h = h + rearrange(self.time_emb_proj(F.silu(time)), "n c -> n c 1 1")
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


class GEGLU(nn.Module):
    """Linear layer to `2 * out` features, one half gating the other (arXiv:2002.05202)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The identity keeps the published key names: net.0 and net.2, with a dropout between them in training.
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each with a LayerNorm and a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map (arXiv:2112.10752, eq. 3 and appendix E.2.1).

    `(n, c, h, w)` -> `(n, c, h, w)`. Each block takes its own keys and values of the prompt off `contexts`.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, *, layers: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads) for _ in range(layers)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, contexts: Iterator[KeysValues]) -> Tensor:
        height, width = x.shape[-2:]
        h = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, next(contexts))
        # In this order the sum has the memory layout of x, and not that of the tokens.
        return x + rearrange(self.proj_out(h), "n (h w) c -> n c h w", h=height, w=width)


class Downsample(nn.Module):
    """Halve height and width with a stride-2 convolution.

    The U-Net pads one cell on every side; the autoencoder pads only right and below, as the originals do.
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then a convolution. `size` overrides the doubled size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            size = (x.shape[-2] * 2, x.shape[-1] * 2)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
