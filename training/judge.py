"""What a program sees in a picture: the scene's words by classical vision, and the nearest icon.

No learned part: colours by distance in CIE Lab, shapes by overlap with drawn outlines, icons by distance of small
crops. `tests/training` holds it to about 100 % on true renders and to chance on wrong labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from training.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, Pixels, Scene, mask

FRAME = 8  # pixels at the border that only the background covers
TEMPLATE = 64  # side of the square in which outlines are compared
MINIMAL_OVERLAP = 0.72  # intersection over union below which an outline is no shape at all
MINIMAL_AREA = 900  # pixels
CENTRAL = 16.0  # pixels from the middle up to which an object counts as centred
LARGE_FROM = 135.0  # pixels
ICON_SIDE = 32

Lab = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What was seen; None where nothing could be made out."""

    background: str
    colour: str | None
    shape: str | None
    position: str | None
    size: str | None

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Word by word, whether the picture shows what `scene` says."""
        words = ("background", "colour", "shape", "position", "size")
        return {word: getattr(self, word) == getattr(scene, word) for word in words}


def _lab(rgb: NDArray[np.generic]) -> Lab:
    """SRGB in 0..255, any leading shape -> CIE Lab of the same shape, float32."""
    flat = np.asarray(rgb, dtype=np.float32).reshape(1, -1, 3) / np.float32(255)
    return np.asarray(cv2.cvtColor(flat, cv2.COLOR_RGB2Lab), dtype=np.float32).reshape(rgb.shape)


def _nearest(value: Lab, palette: Mapping[str, tuple[int, int, int]]) -> str:
    names = list(palette)
    distances = np.linalg.norm(_lab(np.array([palette[name] for name in names])) - value, axis=1)
    return names[int(distances.argmin())]


def _ground(lab: Lab) -> Lab:
    """The background's colour: the median of the frame."""
    frame = np.ones(lab.shape[:2], dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return np.asarray(np.median(lab[frame], axis=0), dtype=np.float32)


def find_object(lab: Lab) -> NDArray[np.bool_] | None:
    """The largest connected area that differs from the background: (h, w), or None."""
    distance = np.linalg.norm(lab - _ground(lab), axis=2)
    threshold = max(10.0, 0.5 * float(np.percentile(distance, 97)))
    count, labels, stats, _ = cv2.connectedComponentsWithStats((distance > threshold).astype(np.uint8))
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    if stats[largest, cv2.CC_STAT_AREA] < MINIMAL_AREA:
        return None
    return np.asarray(labels == largest)


def _box(area: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the true pixels; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _normalised(area: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The area's box, its longer side scaled to `TEMPLATE`, centred: (64, 64) in [0, 1]."""
    left, top, right, bottom = _box(area)
    side = max(right - left, bottom - top)
    square = np.zeros((side, side), dtype=np.float32)
    x, y = (side - (right - left)) // 2, (side - (bottom - top)) // 2
    square[y : y + bottom - top, x : x + right - left] = area[top:bottom, left:right]
    return np.asarray(cv2.resize(square, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA), dtype=np.float32)


@lru_cache(maxsize=1)
def _templates() -> tuple[tuple[str, NDArray[np.float32]], ...]:
    middle = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    return tuple(
        (shape, _normalised(mask(shape, 200.0, middle, degrees) > 0.5))
        for shape in SHAPES
        for degrees in (-3.0, 0.0, 3.0)
    )


def recognise(area: NDArray[np.bool_]) -> str | None:
    """The shape whose outline overlaps best, if it overlaps well."""
    seen = _normalised(area)
    overlaps = [
        (float(np.minimum(seen, template).sum() / np.maximum(seen, template).sum()), shape)
        for shape, template in _templates()
    ]
    best, shape = max(overlaps)
    return shape if best >= MINIMAL_OVERLAP else None


def look(picture: Pixels) -> Sighting:
    """Describe a (256, 256, 3) picture in the words of the scenes' grammar."""
    lab = _lab(picture)
    background = _nearest(_ground(lab), BACKGROUNDS)
    area = find_object(lab)
    if area is None:
        return Sighting(background=background, colour=None, shape=None, position=None, size=None)
    inner = cv2.erode(area.astype(np.uint8), np.ones((5, 5), dtype=np.uint8)).astype(bool)
    left, top, right, bottom = _box(area)
    x, y = (left + right - IMAGE_SIZE) / 2, (top + bottom - IMAGE_SIZE) / 2
    if max(abs(x), abs(y)) <= CENTRAL:
        position = "center"
    elif abs(x) > abs(y):
        position = "left" if x < 0 else "right"
    else:
        position = "top" if y < 0 else "bottom"
    return Sighting(
        background=background,
        colour=_nearest(np.median(lab[inner if inner.any() else area], axis=0), COLOURS),
        shape=recognise(area),
        position=position,
        size="large" if max(right - left, bottom - top) >= LARGE_FROM else "small",
    )


def icon_features(picture: Pixels) -> NDArray[np.float32]:
    """The object on its background, cut out and shrunk: (32 * 32 * 3,) Lab values."""
    lab = _lab(picture)
    distance = np.linalg.norm(lab - _ground(lab), axis=2)
    area = cv2.morphologyEx((distance > 8).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), dtype=np.uint8)) > 0
    left, top, right, bottom = _box(area) if area.any() else (0, 0, IMAGE_SIZE, IMAGE_SIZE)
    half = max(right - left, bottom - top) // 2 + 4
    x, y = (left + right) // 2, (top + bottom) // 2
    border = cv2.copyMakeBorder(lab, half, half, half, half, cv2.BORDER_REPLICATE)
    cut = border[y : y + 2 * half, x : x + 2 * half]
    small = cv2.resize(cut, (ICON_SIDE, ICON_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32).reshape(-1)


def nearest_name(picture: Pixels, gallery: Iterable[tuple[str, NDArray[np.float32]]]) -> str:
    """The name in `gallery` (name, features) whose picture is nearest."""
    seen = icon_features(picture)
    return min(gallery, key=lambda entry: float(np.abs(entry[1] - seen).sum()))[0]
