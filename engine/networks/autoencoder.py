"""The autoencoder: convolutional, with lightly regularised latents (arXiv:2112.10752, 3.1).

Regularised by a small KL penalty, or by a codebook that the decoder absorbs; the networks are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentmill.engine.loading.config import VAEConfig
from latentmill.engine.networks.attention import Attention, KeysValues
from latentmill.engine.networks.blocks import Downsample, ResnetBlock, Upsample
from latentmill.engine.networks.embedding import Embedding
from latentmill.engine.networks.interface import Autoencoder

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """The encoder's posterior: `mean` and `logvar`, each `(n, c, h, w)`; logvar is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one latent per row."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over each row: `(n,)`."""
        return 0.5 * torch.sum(self.mean**2 + self.logvar.exp() - 1.0 - self.logvar, dim=(1, 2, 3))


class PixelAttention(Attention):
    """Single-head self-attention over the cells of a feature map, behind a norm and with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        height, width = x.shape[-2:]
        h = super().forward(rearrange(self.group_norm(x), "n c h w -> n (h w) c"), context)
        return x + rearrange(h, "n (h w) c -> n c h w", h=height, w=width)


class MidBlock(nn.Module):
    """Residual, attention, residual at the latent resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.channels[-1]
        self.resnets = nn.ModuleList([_resnet(channels, channels, config) for _ in range(2)])
        self.attentions = nn.ModuleList([PixelAttention(channels, config.norm_groups)] if config.mid_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the level has it, then resampling if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: VAEConfig,
        *,
        layers: int,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [_resnet(in_channels if layer == 0 else out_channels, out_channels, config) for layer in range(layers)]
        )
        self.attentions = nn.ModuleList(
            [PixelAttention(out_channels, config.norm_groups) for _ in range(layers if attention else 0)]
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, symmetric=False)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        for resampler in (*self.downsamplers, *self.upsamplers):
            x = resampler(x)
        return x


class Encoder(nn.Module):
    """Pixels `(n, 3, h, w)` in [-1, 1] -> moments or latents `(n, out_channels, h / f, w / f)`."""

    def __init__(self, config: VAEConfig, out_channels: int) -> None:
        super().__init__()
        channels = config.channels
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Level(
                    channels[max(level - 1, 0)],
                    channels[level],
                    config,
                    layers=config.layers_per_block,
                    attention=config.attention[level],
                    downsample=level < last,
                )
                for level in range(len(channels))
            ]
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class Decoder(nn.Module):
    """Latents `(n, latent, h / f, w / f)` -> pixels `(n, 3, h, w)`, about [-1, 1]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            [
                Level(
                    channels[min(level + 1, len(channels) - 1)],
                    channels[level],
                    config,
                    layers=config.layers_per_block + 1,
                    attention=config.attention[level],
                    upsample=level > 0,
                )
                for level in reversed(range(len(channels)))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z), inplace=True))


class AutoencoderKL(Autoencoder):
    """Encoder and decoder, with 1x1 convolutions between if any. Latents are unscaled (see `config.scaling_factor`)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.latent_channels)
        self.decoder = Decoder(config)
        self.quant_conv, self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1) if config.quant_conv else nn.Identity()
            for channels in (2 * config.latent_channels, config.latent_channels)
        )

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """`(n, 3, h, w)` in [-1, 1] -> posterior over `(n, latent, h / f, w / f)`."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of `encode`'s."""
        gaussian = self.encode(pixels)
        return gaussian.mean, torch.exp(0.5 * gaussian.logvar)

    def decode(self, latents: Tensor) -> Tensor:
        """`(n, latent, h / f, w / f)` -> `(n, 3, h, w)`, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))


class VectorQuantizer(nn.Module):
    """A codebook: each cell of the latents `(n, c, h, w)` becomes its nearest entry (arXiv:1711.00937, eq. 1)."""

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        self.embedding = Embedding(entries, dim)

    def forward(self, latents: Tensor) -> Tensor:
        # One row at a time: the distances of a whole batch would take gigabytes.
        return torch.stack([self._nearest(row) for row in latents])

    def _nearest(self, row: Tensor) -> Tensor:
        cells = rearrange(row, "c h w -> (h w) c")
        nearest = torch.cdist(cells.float(), self.embedding.weight.float()).argmin(dim=1)
        return rearrange(self.embedding(nearest), "(h w) c -> c h w", h=row.shape[-2])


class VQModel(Autoencoder):
    """Encoder and decoder with a codebook. The decoder absorbs the quantiser: `encode` gives latents before it."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if config.codebook_size is None:
            raise ValueError("this config has no codebook: build AutoencoderKL")
        self.config = config
        self.encoder = Encoder(config, config.latent_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """`(n, 3, h, w)` in [-1, 1] -> `(n, codebook_dim, h / f, w / f)`, not quantised."""
        return self.quant_conv(self.encoder(pixels))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `encode`: nothing of it is drawn."""
        return self.encode(pixels), None

    def decode(self, latents: Tensor) -> Tensor:
        """`(n, codebook_dim, h / f, w / f)` -> `(n, 3, h, w)`, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(self.quantize(latents)))


def build_autoencoder(config: VAEConfig) -> Autoencoder:
    """The autoencoder that the config describes."""
    return AutoencoderKL(config) if config.codebook_size is None else VQModel(config)


def _resnet(in_channels: int, out_channels: int, config: VAEConfig) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, time_dim=None, groups=config.norm_groups, eps=_EPS)
