"""What a program sees in a picture: the words of scenes and pairs by classical vision, and the nearest icon.

No learned part: colours by distance in CIE Lab, shapes by overlap with drawn outlines, icons by distance of small
crops. How crisp and true edges are is said by `training.edges`. `tests/training` holds the judge to about 100 % on true
renders and to chance on wrong labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from training.pairs import RELATIONS, Pair, Thing
from training.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, Pixels, Scene, mask

FRAME = 8  # pixels at the border that only the background covers
TEMPLATE = 64  # side of the square in which outlines are compared
MINIMAL_OVERLAP = 0.72  # intersection over union below which an outline is no shape at all
MINIMAL_AREA = 900  # pixels
FAINTEST = 10.0  # distance in Lab below which nothing is seen
CENTRAL = 16.0  # pixels from the middle up to which an object counts as centred
LARGE_FROM = 135.0  # pixels
ICON_SIDE = 32

Lab = NDArray[np.float32]
Point = tuple[float, float]
Area = NDArray[np.bool_]  # (h, w), true where something is


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


def to_lab(rgb: NDArray[np.generic]) -> Lab:
    """SRGB in 0..255, any leading shape -> CIE Lab of the same shape, float32."""
    flat = np.asarray(rgb, dtype=np.float32).reshape(1, -1, 3) / np.float32(255)
    return np.asarray(cv2.cvtColor(flat, cv2.COLOR_RGB2Lab), dtype=np.float32).reshape(rgb.shape)


def _nearest(value: Lab, palette: Mapping[str, tuple[int, int, int]]) -> str:
    names = list(palette)
    distances = np.linalg.norm(to_lab(np.array([palette[name] for name in names])) - value, axis=1)
    return names[int(distances.argmin())]


def _ground(lab: Lab) -> Lab:
    """The background's colour: the median of the frame."""
    frame = np.ones(lab.shape[:2], dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return np.asarray(np.median(lab[frame], axis=0), dtype=np.float32)


def find_object(lab: Lab) -> Area | None:
    """The largest connected area that differs from the background: (h, w), or None."""
    distance = np.linalg.norm(lab - _ground(lab), axis=2)
    threshold = max(FAINTEST, 0.5 * float(np.percentile(distance, 97)))
    return next(iter(_parts(distance > threshold)), None)


def find_objects(lab: Lab) -> list[Area]:
    """All connected areas that differ from the background, the largest first, each up to half of its own contrast."""
    distance = np.linalg.norm(lab - _ground(lab), axis=2)
    found = []
    for area in _parts(distance > FAINTEST):
        found += _parts(area & (distance > 0.5 * float(np.median(distance[area]))))[:1]
    return found


def _parts(area: Area) -> list[Area]:
    """The connected parts of `area` that are large enough for an object, the largest first."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(area.astype(np.uint8))
    sizes = stats[1:, cv2.CC_STAT_AREA]
    order = [int(index) for index in np.argsort(-sizes) if sizes[index] >= MINIMAL_AREA]
    return [np.asarray(labels == index + 1) for index in order]


def box(area: Area) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the true pixels; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _normalised(area: Area) -> NDArray[np.float32]:
    """The area's box, its longer side scaled to `TEMPLATE`, centred: (64, 64) in [0, 1]."""
    left, top, right, bottom = box(area)
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


def recognise(area: Area) -> str | None:
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
    lab = to_lab(picture)
    background = _nearest(_ground(lab), BACKGROUNDS)
    area = find_object(lab)
    if area is None:
        return Sighting(background=background, colour=None, shape=None, position=None, size=None)
    left, top, right, bottom = box(area)
    x, y = (left + right - IMAGE_SIZE) / 2, (top + bottom - IMAGE_SIZE) / 2
    if max(abs(x), abs(y)) <= CENTRAL:
        position = "center"
    elif abs(x) > abs(y):
        position = "left" if x < 0 else "right"
    else:
        position = "top" if y < 0 else "bottom"
    return Sighting(
        background=background,
        colour=colour_of(lab, area),
        shape=recognise(area),
        position=position,
        size="large" if max(right - left, bottom - top) >= LARGE_FROM else "small",
    )


def colour_of(lab: Lab, area: Area) -> str:
    """The colour of most of `area`, its border left out."""
    inner = cv2.erode(area.astype(np.uint8), np.ones((5, 5), dtype=np.uint8)).astype(bool)
    return _nearest(np.median(lab[inner if inner.any() else area], axis=0), COLOURS)


PAIR_WORDS = ("background", "colours", "shapes", "relation")


def look_at_pair(picture: Pixels, pair: Pair) -> dict[str, bool]:
    """Word by word, whether a (256, 256, 3) picture shows what `pair` says.

    The two largest things are taken as its objects in the order that fits their words best. The relation is right
    if that order is the one that it asks for, and the things lie apart along its axis.
    """
    lab = to_lab(picture)
    marks = dict.fromkeys(PAIR_WORDS, False)
    marks["background"] = _nearest(_ground(lab), BACKGROUNDS) == pair.background
    areas = find_objects(lab)[:2]
    if len(areas) < 2:
        return marks
    seen = [(Thing(shape=recognise(area) or "", colour=colour_of(lab, area)), _middle(area)) for area in areas]

    def fit(order: list[tuple[Thing, Point]]) -> list[tuple[bool, bool]]:
        things = zip((pair.first, pair.second), order, strict=True)
        return [(wanted.colour == thing.colour, wanted.shape == thing.shape) for wanted, (thing, _) in things]

    straight, swapped = fit(seen), fit(seen[::-1])
    best, order = (straight, seen) if sum(map(sum, straight)) >= sum(map(sum, swapped)) else (swapped, seen[::-1])
    marks["colours"] = all(colour for colour, _ in best)
    marks["shapes"] = all(shape for _, shape in best)
    (x1, y1), (x2, y2) = order[0][1], order[1][1]
    x, y = RELATIONS[pair.relation]
    along, across = (x1 - x2) * x + (y1 - y2) * y, abs((x1 - x2) * y) + abs((y1 - y2) * x)
    certain = sum(map(sum, straight)) != sum(map(sum, swapped))
    marks["relation"] = certain and along > max(CENTRAL, across)
    return marks


def _middle(area: Area) -> Point:
    left, top, right, bottom = box(area)
    return (left + right) / 2, (top + bottom) / 2


def icon_features(picture: Pixels) -> NDArray[np.float32]:
    """The object on its background, cut out and shrunk: (32 * 32 * 3,) Lab values."""
    lab = to_lab(picture)
    distance = np.linalg.norm(lab - _ground(lab), axis=2)
    area = cv2.morphologyEx((distance > 8).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), dtype=np.uint8)) > 0
    left, top, right, bottom = box(area) if area.any() else (0, 0, IMAGE_SIZE, IMAGE_SIZE)
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
