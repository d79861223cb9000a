"""The denoising U-Net with cross-attention (arXiv:2112.10752, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.loading.config import UNetConfig
from latentmill.engine.networks.attention import KeysValues
from latentmill.engine.networks.blocks import Downsample, ResnetBlock, SpatialTransformer, TransformerBlock, Upsample


def sinusoidal_embedding(values: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """Sines and cosines of `values (n,)` at `dim / 2` geometric frequencies: `(n, dim) float32` (arXiv:1706.03762)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) * -math.log(10_000)
    frequencies = torch.exp(exponents / (half - freq_shift))
    angles = rearrange(values.float(), "n -> n 1") * rearrange(frequencies, "d -> 1 d")
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: `(n, in)` -> `(n, out)`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class DownBlock(nn.Module):
    """One level on the way down; every layer's output is also a skip connection."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, time_dim: int) -> None:
        super().__init__()
        channels = config.channels[level]
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(
            [_resnet(config, in_channels if layer == 0 else channels, channels, time_dim) for layer in range(layers)]
        )
        self.attentions = nn.ModuleList(
            [_transformer(config, level) for _ in range(layers if config.cross_attention[level] else 0)]
        )
        self.downsamplers = nn.ModuleList(
            [] if level == len(config.channels) - 1 else [Downsample(channels, symmetric=True)]
        )

    def forward(self, x: Tensor, time: Tensor, contexts: Iterator[KeysValues]) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        for layer, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[layer](x, contexts)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual, transformer, residual at the lowest resolution."""

    def __init__(self, config: UNetConfig, time_dim: int) -> None:
        super().__init__()
        channels = config.channels[-1]
        self.resnets = nn.ModuleList([_resnet(config, channels, channels, time_dim) for _ in range(2)])
        self.attentions = nn.ModuleList([_transformer(config, len(config.channels) - 1)])

    def forward(self, x: Tensor, time: Tensor, contexts: Iterator[KeysValues]) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, contexts)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up; each layer takes one skip connection off the stack."""

    def __init__(self, config: UNetConfig, level: int, time_dim: int) -> None:
        super().__init__()
        levels = len(config.channels)
        channels = config.channels[level]
        from_below = config.channels[min(level + 1, levels - 1)]
        skip_at_end = config.channels[max(level - 1, 0)]
        layers = config.layers_per_block + 1
        incoming = [from_below] + [channels] * (layers - 1)
        skips = [channels] * (layers - 1) + [skip_at_end]
        self.resnets = nn.ModuleList(
            [_resnet(config, below + skip, channels, time_dim) for below, skip in zip(incoming, skips, strict=True)]
        )
        self.attentions = nn.ModuleList(
            [_transformer(config, level) for _ in range(layers if config.cross_attention[level] else 0)]
        )
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, contexts: Iterator[KeysValues]) -> Tensor:
        for layer, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[layer](x, contexts)
        for upsampler in self.upsamplers:
            # Doubling misses the skip's size where a side of the latents is not a multiple of the U-Net's factor.
            x = upsampler(x, size=(skips[-1].shape[-2], skips[-1].shape[-1]))
        return x


class UNet(nn.Module):
    """Predicts noise, velocity or x0 from noisy latents.

    `latents (n, in, h, w)`, `timesteps (n,)`, `context (n, l, context_dim)` -> `(n, out, h, w)`, all in the module's
    dtype. Models conditioned on text and size (SDXL) also take `pooled (n, p)` and `time_ids (n, 6)`. `projected` is
    what `project` makes of the context: it is the same at every step.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first = config.channels[0]
        time_dim = first * 4
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, time_dim)
        if config.projection_input_dim is not None:
            self.add_embedding = TimestepEmbedding(config.projection_input_dim, time_dim)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(config, level, config.channels[max(level - 1, 0)], time_dim)
                for level in range(len(config.channels))
            ]
        )
        self.mid_block = MidBlock(config, time_dim)
        self.up_blocks = nn.ModuleList(
            [UpBlock(config, level, time_dim) for level in reversed(range(len(config.channels)))]
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        projected: Sequence[KeysValues] | None = None,
    ) -> Tensor:
        contexts = iter(self.project(context) if projected is None else projected)
        time = self._embed_time(timesteps, latents.dtype, pooled, time_ids)
        x = self.conv_in(latents)
        skips = [x]
        for down_block in self.down_blocks:
            x, new_skips = down_block(x, time, contexts)
            skips.extend(new_skips)
        x = self.mid_block(x, time, contexts)
        for up_block in self.up_blocks:
            x = up_block(x, skips, time, contexts)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))

    def project(self, context: Tensor) -> list[KeysValues]:
        """Keys and values of the context for each cross-attention, in the order of the forward pass."""
        return [block.attn2.project(context) for block in self.modules() if isinstance(block, TransformerBlock)]

    def _embed_time(
        self, timesteps: Tensor, dtype: torch.dtype, pooled: Tensor | None, time_ids: Tensor | None
    ) -> Tensor:
        config = self.config
        sinusoid = sinusoidal_embedding(
            timesteps, config.channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        time = self.time_embedding(sinusoid.to(dtype))
        if config.addition_time_embed_dim is not None:
            if pooled is None or time_ids is None:
                raise ValueError("this U-Net is conditioned on a pooled text embedding and time ids; pass both")
            sizes = sinusoidal_embedding(
                time_ids.flatten(),
                config.addition_time_embed_dim,
                flip_sin_to_cos=config.flip_sin_to_cos,
                freq_shift=config.freq_shift,
            )
            sizes = rearrange(sizes, "(n ids) d -> n (ids d)", n=len(time_ids))
            time = time + self.add_embedding(torch.cat([pooled, sizes.to(dtype)], dim=-1))
        return time


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, time_dim: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, time_dim=time_dim, groups=config.norm_groups, eps=config.norm_eps)


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.channels[level],
        config.context_dim,
        config.heads[level],
        layers=config.transformer_layers[level],
        groups=config.norm_groups,
    )
