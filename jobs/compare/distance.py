"""How far two pictures of one size are apart: in pixel values, and as people see them, by structural similarity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentmill.engine.types import Pixels

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SEEN_SIDE = 256
"""The shorter side at which structure is compared, about: what one sees of a picture at a usual distance."""

_Plane = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """How far apart two pictures are.

    `pixel` is the mean absolute difference of their 8-bit values, `greatest` the greatest one, both 0 to 255;
    `perceptual` is 1 - SSIM, from 0 for the same picture to 2.
    """

    pixel: float
    greatest: int
    perceptual: float


def distance(one: Pixels, other: Pixels) -> Distance:
    """Of two pictures (h, w, 3) RGB of one size. The same pictures always give the same numbers."""
    apart = np.abs(one.astype(np.int16) - other)
    return Distance(
        pixel=float(apart.mean(dtype=np.float64)), greatest=int(apart.max()), perceptual=1 - ssim(one, other)
    )


def ssim(one: Pixels, other: Pixels) -> float:
    """The mean structural similarity of two pictures (h, w, 3) uint8, over places and colours: 1 for the same one.

    Wang, Bovik, Sheikh, Simoncelli, IEEE Transactions on Image Processing 13(4), 2004, equation 13, with the Gaussian
    window, the constants and the shrinking (to about 256 pixels) of the authors' own program.
    """
    import cv2

    x, y = _shrunk(one), _shrunk(other)

    def mean(plane: _Plane) -> _Plane:
        blurred: _Plane = cv2.GaussianBlur(plane, (_WINDOW, _WINDOW), _SIGMA)
        margin = _WINDOW // 2 if min(plane.shape[:2]) > _WINDOW else 0  # where the window lies within the picture
        return blurred[margin : len(blurred) - margin, margin : blurred.shape[1] - margin]

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x * mean_x + (mean(y * y) - mean_y * mean_y)
    covariance = mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float((likeness / ((mean_x * mean_x + mean_y * mean_y + _C1) * (variances + _C2))).mean())


def _shrunk(picture: Pixels) -> _Plane:
    """The picture as (h, w, 3) float64, each value the mean of a square of pixels."""
    import cv2

    height, width = picture.shape[:2]
    factor = max(1, round(min(height, width) / _SEEN_SIDE))
    plane = picture.astype(np.float64)
    if factor == 1:
        return plane
    shrunk: _Plane = cv2.resize(plane, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    return shrunk
