"""A perceptual hash: pictures that look alike have hashes that differ in few of 64 bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentmill.engine.types import Pixels

_SIDE, _KEPT = 32, 8


_FREQUENCY, _PLACE = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
_COSINES: NDArray[np.float64] = 2 * np.cos(np.pi * _FREQUENCY * (2 * _PLACE + 1) / (2 * _SIDE))
"""The first rows of the discrete cosine transform, type II, not normalised."""


class PerceptualHash:
    """The hash that the library imagehash calls phash, bit for bit, as its 16 hexadecimal digits.

    Lowest frequencies of the shrunk grey picture, each above their median or not.
    """

    name = "phash"
    version = "1"
    columns = {"phash": "string"}  # noqa: RUF012 - a constant of the class
    hash_column = "phash"

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, list[str]]:  # noqa: ARG002 - as all are called
        """The hash of each picture."""
        return {"phash": [perceptual_hash(picture) for picture in pictures]}


def perceptual_hash(picture: Pixels) -> str:
    """The hash of (h, w, 3) RGB."""
    shrunk = Image.fromarray(picture).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    # rounded, so that what is exactly nothing, in an even picture, is so on every machine
    low = np.round(_COSINES @ np.asarray(shrunk, dtype=np.float64) @ _COSINES.T, 6)
    return np.packbits(low > np.median(low)).tobytes().hex()
