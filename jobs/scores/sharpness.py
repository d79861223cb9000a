"""How sharp a picture is: the variance of its Laplacian (Pech-Pacheco and others, 2000)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2

from latentmill.engine.types import Pixels


class Sharpness:
    """One number a picture, of its pixels alone; comparable among pictures of one size."""

    name = "sharpness"
    version = "1"
    columns = {"sharpness": "float32"}  # noqa: RUF012 - a constant of the class

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, list[float]]:  # noqa: ARG002 - as all are called
        """The variance of the Laplacian of each picture's grey values."""
        grey = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures)
        return {"sharpness": [float(cv2.Laplacian(picture, cv2.CV_64F).var()) for picture in grey]}
