"""Flux's transformer: blocks over text and picture beside each other, then blocks over both as one sequence.

By its authors' code, which is its only description: positions are rotations by place (arXiv:2104.09864), and in single
blocks attention and feed-forward work side by side (arXiv:2302.05442, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.networks.joint_blocks import (
    JointAttention,
    JointBlock,
    Modulation,
    Rotation,
    TimeAndText,
    bounded,
    normed,
)

PATCH = 2
_SLOWEST = 10_000


class SingleBlock(nn.Module):
    """Attention and feed-forward of the same normed tokens `(n, l, dim)`, and one last layer for both."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = JointAttention(dim, heads, added=False, out=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, time: Tensor, rotation: Rotation) -> Tensor:
        shift, scale, gate = self.norm(time)
        modulated = normed(x) * (1 + scale) + shift
        both = [self.attn(modulated, rotation), F.gelu(self.proj_mlp(modulated), approximate="tanh")]
        return bounded(x + gate * self.proj_out(torch.cat(both, dim=-1)))


class Flux(nn.Module):
    """Predicts flow from noisy latents.

    `latents (n, c, h, w)`, `timesteps (n,)`, `context (n, l, context_dim)`, `pooled (n, p)` -> `(n, c, h, w)`, all in
    the module's dtype; with `guidance` embedded also `guidance (n,)`. `axes` are the features of a head that turn with
    a token's place: in text, down and across.
    """

    def __init__(
        self,
        *,
        channels: int,
        heads: int,
        axes: Sequence[int],
        layers: int,
        single_layers: int,
        context_dim: int,
        pooled_dim: int,
        guidance: bool,
    ) -> None:
        super().__init__()
        dim = heads * sum(axes)
        self.axes = axes
        self.x_embedder = nn.Linear(PATCH**2 * channels, dim)
        self.context_embedder = nn.Linear(context_dim, dim)
        self.time_text_embed = TimeAndText(dim, pooled_dim, guidance=guidance)
        self.transformer_blocks = nn.ModuleList([JointBlock(dim, heads) for _ in range(layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(dim, heads) for _ in range(single_layers)])
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, PATCH**2 * channels)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        height, width = (side // PATCH for side in latents.shape[-2:])
        time = self.time_text_embed(timesteps, pooled, guidance)
        x = self.x_embedder(rearrange(latents, "n c (h p) (w q) -> n (h w) (c p q)", p=PATCH, q=PATCH))
        text = self.context_embedder(context)
        rotation = self._rotation(text.shape[1], height, width, latents.device)
        for block in self.transformer_blocks:
            x, text = block(x, text, time, rotation)
        both = torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            both = block(both, time, rotation)
        scale, shift = self.norm_out(time)
        patches = self.proj_out(normed(both[:, text.shape[1] :]) * (1 + scale) + shift)
        return rearrange(patches, "n (h w) (c p q) -> n c (h p) (w q)", h=height, p=PATCH, q=PATCH)

    def _rotation(self, tokens: int, height: int, width: int, device: torch.device) -> Rotation:
        """Every token of the text is at place 0, and so is the picture's first patch."""
        down = repeat(torch.arange(height, device=device), "h -> (h w)", w=width)
        across = repeat(torch.arange(width, device=device), "w -> (h w)", h=height)
        angles = []
        for places, features in zip((torch.zeros_like(down), down, across), self.axes, strict=True):
            steps = torch.arange(0, features, 2, dtype=torch.float64, device=device) / features
            of_axis = rearrange(F.pad(places, (tokens, 0)).double(), "l -> l 1") / _SLOWEST**steps
            angles.append(repeat(of_axis, "l d -> l 1 (d two)", two=2))
        turned = torch.cat(angles, dim=-1)
        return turned.cos().float(), turned.sin().float()
