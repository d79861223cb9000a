"""The patch critic of the first stage (arXiv:1611.07004) and how much it counts (arXiv:2012.09841, eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHT = 0.25  # of the critic's gradient at the decoder's last layer, measured by the reconstruction's
LARGEST_RATIO = 1e3


class Critic(nn.Module):
    """(n, 3, h, w) -> one logit per patch of 38 pixels: high for true pictures."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
            if before != 3:
                layers.append(nn.GroupNorm(8, after))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The critic's part in one step: its gradient for the pictures, and figures for the curves."""

    gradient: Tensor
    ratio: float
    logit: float


def judge(critic: Critic, decoded: Tensor, reconstruction: Tensor, last_layer: Tensor) -> Verdict:
    """What the critic wants of `decoded`, scaled so that its gradient at `last_layer` is `WEIGHT` of the other's.

    `reconstruction` is the other losses' gradient for `decoded`, of its shape.
    """
    pixels = decoded.detach().requires_grad_()
    logits = critic(pixels)
    (wish,) = torch.autograd.grad(-logits.mean(), pixels)
    (ours,) = torch.autograd.grad(decoded, last_layer, reconstruction, retain_graph=True)
    (theirs,) = torch.autograd.grad(decoded, last_layer, wish, retain_graph=True)
    ratio = float((ours.norm() / (theirs.norm() + 1e-8)).clamp(max=LARGEST_RATIO))
    return Verdict(gradient=wish * (WEIGHT * ratio), ratio=ratio, logit=float(logits.detach().mean()))


def critic_loss(critic: Critic, real: Tensor, decoded: Tensor) -> Tensor:
    """The critic's own hinge loss: 1 while it cannot tell true from decoded, 0 where it tells them all apart."""
    return 0.5 * (F.relu(1 - critic(real)).mean() + F.relu(1 + critic(decoded.detach())).mean())
