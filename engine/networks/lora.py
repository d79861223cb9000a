"""LoRAs beside the weights of a network (arXiv:2106.09685, eq. 3), with a scale for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scales = Mapping[str, Tensor]
"""For each LoRA that counts, the scale in each row, `(n,)`."""

CONDITION = "lora "
"""Begins the names under which a denoiser is given scales beside its own conditions."""


class Switchboard:
    """The scales of the rows that the networks see now: layers deep inside them read it."""

    def __init__(self) -> None:
        self.scales: Scales = {}

    @contextmanager
    def holding(self, scales: Scales) -> Iterator[None]:
        """Within the context these scales count, afterwards none."""
        self.scales = scales
        try:
            yield
        finally:
            self.scales = {}


_RANKS = 8
"""Ranks are filled up with zeros to a multiple of this. Below 4, kernels of CPUs take other paths, by which a row's
bits depend on its place in the batch; those of GPUs are fast from 8 on.
"""


class LowRank(nn.Module):
    """One LoRA's term of one layer: `up (o, r)` after `down (r, ...)`, or `down (o, ...)` alone."""

    def __init__(self, name: str, down: Tensor, up: Tensor | None) -> None:
        super().__init__()
        self.name = name
        if up is not None:
            missing = -len(down) % _RANKS
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = F.pad(up, (0, missing))
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = None if up is None else nn.Parameter(up, requires_grad=False)

    def forward(self, x: Tensor, scale: Tensor, layer: nn.Module) -> Tensor:
        """`x (n, ...)` and `scale (n,)` -> what is added to the layer's output, in the dtype of `x`.

        A row whose scale is 0 gets zeros, even where its own term would not be finite.
        """
        convolves = isinstance(layer, nn.Conv2d)
        down = self.down.to(x.dtype)
        h = F.conv2d(x, down, None, layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else F.linear(x, down)
        rows = scale.to(h.dtype).view(-1, *[1] * (h.dim() - 1))
        h = torch.where(rows != 0, h * rows, 0.0)
        if self.up is None:
            return h
        up = self.up.to(x.dtype)
        return F.conv2d(h, up[:, :, None, None]) if convolves else F.linear(h, up)


class Adapted(nn.Module):
    """A layer with the terms of LoRAs beside it. Each is added by itself, in the order of their names.

    So a row's bits depend on the LoRAs that count in it, and not on those that count in others.
    """

    def __init__(self, layer: nn.Module, terms: Sequence[LowRank], switchboard: Switchboard) -> None:
        super().__init__()
        self.layer = layer
        self.terms = nn.ModuleList(terms)
        self._names = [term.name for term in terms]
        self._switchboard = switchboard

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        scales = self._switchboard.scales
        for name, term in zip(self._names, self.terms, strict=True):
            if name in scales:
                y = y + term(x, scales[name], self.layer)
        return y


class ScaledNetwork(nn.Module):
    """A denoiser that takes the scales of its rows as further conditions: as inputs, so that graphs can capture it."""

    def __init__(self, network: nn.Module, switchboard: Switchboard) -> None:
        super().__init__()
        self.network = network
        self._switchboard = switchboard

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, **conditions: Tensor) -> Tensor:
        scales = {name: tensor for name, tensor in conditions.items() if name.startswith(CONDITION)}
        others = {name: tensor for name, tensor in conditions.items() if name not in scales}
        self._switchboard.scales = {name.removeprefix(CONDITION): tensor for name, tensor in scales.items()}
        output: Tensor = self.network(latents, timesteps, context, **others)
        self._switchboard.scales = {}
        return output


def adapt(network: nn.Module, terms: Mapping[str, Sequence[LowRank]], switchboard: Switchboard) -> None:
    """Put the terms beside the layers of a network that lie at these paths."""
    for path, beside in terms.items():
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, Adapted(network.get_submodule(path), beside, switchboard))
