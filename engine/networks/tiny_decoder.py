"""A tiny decoder for previews, TAESD (github.com/madebyollin/taesd): plain convolutions, distilled from a real one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentmill.engine.loading.tiny_config import TinyDecoderConfig
from latentmill.engine.networks.interface import Autoencoder


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between, a residual, and one more ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyDecoder(Autoencoder):
    """Decodes the latents as the denoiser has them: its config's scaling factor is 1 in every published one."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels, last = config.channels, len(config.blocks) - 1
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, channels, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.blocks):
            layers += [TinyBlock(channels) for _ in range(blocks)]
            if level < last:
                layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(channels, 3 if level == last else channels, 3, padding=1, bias=level == last))
        self.layers = nn.Sequential(*layers)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """It has no encoder: a request with an image is refused before."""
        raise NotImplementedError("a decoder for previews encodes no image")

    def decode(self, latents: Tensor) -> Tensor:
        """`(n, c, h / f, w / f)` -> `(n, 3, h, w)`, about [-1, 1], not clamped."""
        return self.layers(torch.tanh(latents / 3) * 3) * 2 - 1
