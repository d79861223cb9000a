"""Stable Diffusion 3's multimodal diffusion transformer (arXiv:2403.03206, section 4), and MMDiT-X of 3.5 medium."""

from __future__ import annotations

from collections.abc import Collection

import torch
from einops import rearrange
from torch import Tensor, nn

from latentmill.engine.networks.joint_blocks import JointBlock, Modulation, TimeAndText, normed


class PatchEmbedding(nn.Module):
    """Patches of latents `(n, c, h, w)` as tokens `(n, l, dim)`, each with the embedding of its place.

    The places are the middle of a grid of `grid` by `grid`, whatever the size: a picture's centre is the grid's.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, dim))

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.proj(latents)
        height, width = patches.shape[-2:]
        top, left = (self.grid - height) // 2, (self.grid - width) // 2
        places = rearrange(self.pos_embed, "1 (h w) d -> 1 h w d", h=self.grid)
        cropped = places[:, top : top + height, left : left + width]
        tokens = rearrange(patches, "n d h w -> n (h w) d").contiguous()
        return tokens + rearrange(cropped, "1 h w d -> 1 (h w) d")


class MMDiT(nn.Module):
    """Predicts flow from noisy latents.

    `latents (n, in, h, w)`, `timesteps (n,)`, `context (n, l, context_dim)`, `pooled (n, p)` -> `(n, out, h, w)`, all
    in the module's dtype. `dual_layers` are the numbers of the blocks with dual attention.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        grid: int,
        heads: int,
        head_dim: int,
        layers: int,
        context_dim: int,
        pooled_dim: int,
        norms: bool,
        dual_layers: Collection[int],
    ) -> None:
        super().__init__()
        dim = heads * head_dim
        self.patch_size = patch_size
        self.pos_embed = PatchEmbedding(in_channels, dim, patch_size, grid)
        self.time_text_embed = TimeAndText(dim, pooled_dim)
        self.context_embedder = nn.Linear(context_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [
                JointBlock(dim, heads, norms=norms, dual=number in dual_layers, last=number == layers - 1)
                for number in range(layers)
            ]
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, *, pooled: Tensor) -> Tensor:
        time = self.time_text_embed(timesteps, pooled)
        x, text = self.pos_embed(latents), self.context_embedder(context)
        for block in self.transformer_blocks:
            x, text = block(x, text, time)
        scale, shift = self.norm_out(time)
        patches = self.proj_out(normed(x) * (1 + scale) + shift)
        return rearrange(
            patches,
            "n (h w) (p q c) -> n c (h p) (w q)",
            h=latents.shape[-2] // self.patch_size,
            p=self.patch_size,
            q=self.patch_size,
        )
