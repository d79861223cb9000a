"""The patch critic of the first stage (arXiv:1611.07004) and how much it counts (arXiv:2012.09841, eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EDGE = 0.1  # range of a colour among neighbouring pixels, in [0, 2], from which on something happens there
WEIGHT = 0.1  # of the critic's gradient at the decoder's last layer, measured by the reconstruction's
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


def eventful(pixels: Tensor) -> Tensor:
    """Which patches hold an edge of the true pictures (n, 3, h, w): (n, 1, h / 8, w / 8), 1 or 0.

    Nine patches in ten of these pictures are flat, and true ones as much as decoded ones: a critic that is asked about
    them all hardly learns.
    """
    spread = F.max_pool2d(pixels, 3, 1, 1) + F.max_pool2d(-pixels, 3, 1, 1)
    return F.max_pool2d((spread.amax(dim=1, keepdim=True) > EDGE).float(), 24, 8, 8)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The critic's part in one step: its gradient for the pictures, and how large it was before the scaling."""

    gradient: Tensor
    ratio: float


def judge(
    critic: Critic, seen: Tensor, where: Tensor, last_layer: Tensor, decoded: Tensor, reconstruction: Tensor
) -> Verdict:
    """What the critic wants of `seen`, scaled so that its gradient at `last_layer` is `WEIGHT` of the other losses'.

    `seen` is part of `decoded`, `where` is `eventful` of the true pictures of that part, `reconstruction` the other
    losses' gradient for `decoded`.
    """
    pixels = seen.detach().requires_grad_()
    (wish,) = torch.autograd.grad(-_mean(critic(pixels), where), pixels)
    (ours,) = torch.autograd.grad(decoded, last_layer, reconstruction, retain_graph=True)
    (theirs,) = torch.autograd.grad(seen, last_layer, wish, retain_graph=True)
    ratio = float((ours.norm() / (theirs.norm() + 1e-8)).clamp(max=LARGEST_RATIO))
    return Verdict(gradient=wish * (WEIGHT * ratio), ratio=ratio)


def critic_loss(critic: Critic, real: Tensor, decoded: Tensor, where: Tensor) -> Tensor:
    """The critic's own hinge loss: 1 while it cannot tell true from decoded, 0 where it tells them all apart."""
    fooled = _mean(F.relu(1 + critic(decoded.detach())), where)
    return 0.5 * (_mean(F.relu(1 - critic(real)), where) + fooled)
