"""How true and how crisp the edges of a picture are, measured by the rendered truth of its caption."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from training.judge import Area, box, find_object, to_lab
from training.scenes import IMAGE_SIZE, Pixels, mask

TOLERANCE = 2.0  # pixels
SEARCH = ((2.0, 4.0, 2.0), (1.0, 2.0, 1.0), (0.5, 1.0, 0.5))  # steps of place, side and turn, coarse to fine


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What a caption leaves open: where exactly the object is, its size in pixels, its turn in degrees."""

    x: float
    y: float
    side: float
    degrees: float = 0.0

    def draw(self, shape: str) -> Area:
        """Where `shape` covers the picture at least half."""
        return np.asarray(mask(shape, self.side, (self.x, self.y), self.degrees) > 0.5)


def _overlap(a: Area, b: Area) -> float:
    return float((a & b).sum()) / max(float((a | b).sum()), 1.0)


def fit(area: Area, shape: str) -> Area:
    """The true `shape` placed so that it covers `area` best."""
    left, top, right, bottom = box(area)
    best = Placement(x=(left + right) / 2, y=(top + bottom) / 2, side=float(max(right - left, bottom - top)))
    score = _overlap(area, best.draw(shape))
    for move, grow, turn in SEARCH:
        improved = True
        while improved:
            improved = False
            for sign in (-1, 1):
                for other in (
                    replace(best, x=best.x + sign * move),
                    replace(best, y=best.y + sign * move),
                    replace(best, side=best.side + sign * grow),
                    replace(best, degrees=best.degrees + sign * turn),
                ):
                    found = _overlap(area, other.draw(shape))
                    if found > score:
                        best, score, improved = other, found, True
    return best.draw(shape)


def boundary(area: Area) -> Area:
    """The pixels of `area` that touch its outside; the picture's own border is none."""
    return area & ~cv2.erode(area.astype(np.uint8), np.ones((3, 3), dtype=np.uint8)).astype(bool)


def f_score(found: Area, true: Area, tolerance: float = TOLERANCE) -> float:
    """Harmonic mean of how much of each boundary lies within `tolerance` pixels of the other, in [0, 1]."""

    def near(one: Area, other: Area) -> float:
        distance = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return float((distance[one] <= tolerance).mean()) if one.any() else 0.0

    edges = boundary(found), boundary(true)
    precision, recall = near(edges[0], edges[1]), near(edges[1], edges[0])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def scene_score(picture: Pixels, shape: str, tolerance: float = TOLERANCE) -> float:
    """The boundary F-score of a picture of one `shape`; 0 where nothing is seen."""
    area = find_object(to_lab(picture))
    return 0.0 if area is None else f_score(area, fit(area, shape), tolerance)


def width(picture: Pixels) -> float:
    """Pixels over which an object's edge rises, in the mean along it: about 1 where it is crisp; NaN without object."""
    lab = to_lab(picture)
    area = find_object(lab)
    if area is None:
        return float("nan")
    inside = cv2.erode(area.astype(np.uint8), np.ones((9, 9), dtype=np.uint8)).astype(bool)
    outside = ~cv2.dilate(area.astype(np.uint8), np.ones((9, 9), dtype=np.uint8)).astype(bool)
    if not (inside.any() and outside.any()):
        return float("nan")
    front, back = np.median(lab[inside], axis=0), np.median(lab[outside], axis=0)
    along = (lab - back) @ (front - back) / max(float(np.square(front - back).sum()), 1e-6)  # 0 outside, 1 inside
    slope = _slope(np.clip(along, 0.0, 1.0).astype(np.float32))
    edge = boundary(area)
    steepest = cv2.dilate(slope, np.ones((3, 3), dtype=np.uint8))[edge]
    return float(np.mean(1.0 / np.maximum(steepest, 1.0 / IMAGE_SIZE)))


def _slope(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much `values` (h, w) rises from a pixel to its neighbour, along the steepest way."""
    x = np.zeros_like(values)
    y = np.zeros_like(values)
    x[:, :-1], y[:-1] = np.diff(values, axis=1), np.diff(values, axis=0)
    return np.asarray(np.hypot(x, y), dtype=np.float32)
