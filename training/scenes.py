"""One-object scenes: a closed grammar of pictures whose content a program can check.

A scene is one shape of one colour and one size at one of five places on a plain background. The grammar is split by a
hash: one combination in ten never appears in training and is kept for the evaluation.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (h, w, 3) sRGB
Mask = NDArray[np.float32]  # (h, w) coverage in [0, 1]

IMAGE_SIZE = 256
SUPERSAMPLING = 3

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 215, 30),
    "green": (40, 150, 60),
    "blue": (35, 75, 205),
    "purple": (125, 50, 165),
    "pink": (245, 110, 175),
    "brown": (125, 75, 40),
    "black": (20, 20, 22),
    "white": (248, 248, 248),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "black": (12, 12, 14),
    "gray": (140, 142, 145),
    "light blue": (160, 212, 245),
    "light green": (175, 230, 165),
    "cream": (252, 240, 200),
    "dark blue": (20, 28, 85),
}
# Pairs whose edge the eye can hardly find are left out: nobody asks for them and no program could judge them.
INVISIBLE = {("white", "white"), ("black", "black"), ("white", "cream"), ("blue", "dark blue"), ("black", "dark blue")}
POSITIONS: dict[str, tuple[float, float]] = {  # the object's centre as a fraction of the free travel, -1..1
    "center": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "top": (0.0, -1.0),
    "bottom": (0.0, 1.0),
}
SIZES = {"small": (110, 122), "large": (160, 176)}  # side of the object's box in pixels
MARGIN = 12  # pixels between an off-centre object and the border


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a scene shows, in the words of its caption."""

    shape: str
    colour: str
    background: str
    position: str
    size: str

    @property
    def held_out(self) -> bool:
        """Whether the combination belongs to the evaluation (about one in ten)."""
        key = f"{self.shape}/{self.colour}/{self.background}/{self.position}/{self.size}"
        return kept_back(key)


def kept_back(key: str) -> bool:
    """Whether the combination named `key` is never trained on: a fixed tenth of all."""
    return hashlib.sha256(key.encode()).digest()[0] < 26


def all_scenes() -> list[Scene]:
    """Every combination of the grammar, in a fixed order."""
    return [
        Scene(shape=shape, colour=colour, background=background, position=position, size=size)
        for shape, colour, background, position, size in itertools.product(
            SHAPES, COLOURS, BACKGROUNDS, POSITIONS, SIZES
        )
        if (colour, background) not in INVISIBLE
    ]


def article(word: str) -> str:
    """The indefinite article before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption of `scene`; without `rng` the plain form that the evaluation uses."""
    place = {"center": "in the center", "left": "on the left", "right": "on the right"}.get(
        scene.position, f"at the {scene.position}"
    )
    first = f"{article(scene.size)} {scene.size} {scene.colour} {scene.shape}"
    full = f"{first} {place} on {article(scene.background)} {scene.background} background"
    form = 0 if rng is None else int(rng.integers(8))
    if form <= 3:
        return full
    if form == 4:
        return f"{first} on {article(scene.background)} {scene.background} background, {place}"
    if form == 5:
        return f"{scene.background} background, {first} {place}"
    short = f"{article(scene.colour)} {scene.colour} {scene.shape}"
    if form == 6:  # the size is left to the model
        return f"{short} {place} on {article(scene.background)} {scene.background} background"
    return f"{short} on {article(scene.background)} {scene.background} background"  # position and size are free


def _regular(points: int, inner: float = 1.0, phase: float = -90.0) -> NDArray[np.float64]:
    """`points` corners on the unit circle, with inner corners between them where `inner` < 1."""
    count = points if inner == 1.0 else 2 * points
    angles = np.deg2rad(phase + np.arange(count) * 360.0 / count)
    radii = np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0.0, 2.0 * np.pi, 120, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1)


def _outline(shape: str) -> NDArray[np.float64]:
    """The shape's polygon, scaled and moved to fill the box [-1, 1] x [-1, 1] along its longer side."""
    arm = 0.36
    polygons = {
        "circle": _regular(96),
        "ring": _regular(96),
        "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64) * 0.9,
        "triangle": _regular(3),
        "diamond": np.array([[0, -1], [0.78, 0], [0, 1], [-0.78, 0]], dtype=np.float64),
        "star": _regular(5, inner=0.42),
        "heart": _heart(),
        "cross": np.array(
            [
                [-arm, -1], [arm, -1], [arm, -arm], [1, -arm], [1, arm], [arm, arm],
                [arm, 1], [-arm, 1], [-arm, arm], [-1, arm], [-1, -arm], [-arm, -arm],
            ],
            dtype=np.float64,
        ),
    }  # fmt: skip
    points = polygons[shape]
    centre = (points.max(axis=0) + points.min(axis=0)) / 2
    reach = 0.9 if shape == "square" else 1.0  # a square of full width would look larger than its neighbours
    scaled: NDArray[np.float64] = (points - centre) / np.abs(points - centre).max() * reach
    return scaled


def mask(shape: str, side: float, centre: tuple[float, float], degrees: float = 0.0) -> Mask:
    """Antialiased coverage of a `shape` with box side `side` pixels around `centre` (x, y): (h, w) in [0, 1]."""
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = _outline(shape) @ rotation.T
    big = np.zeros((IMAGE_SIZE * SUPERSAMPLING, IMAGE_SIZE * SUPERSAMPLING), dtype=np.uint8)

    def draw(scale: float, value: int) -> None:
        corners = (np.asarray(centre) + points * (side / 2 * scale)) * SUPERSAMPLING
        cv2.fillPoly(big, [np.round(corners * 16).astype(np.int32)], value, lineType=cv2.LINE_AA, shift=4)

    draw(1.0, 255)
    if shape == "ring":
        draw(0.55, 0)
    small = cv2.resize(big, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32) / 255.0


def render(scene: Scene, rng: np.random.Generator) -> Pixels:
    """A picture of `scene` with slight jitter in place, size, turn and colour: (256, 256, 3) uint8."""
    side = float(rng.uniform(*SIZES[scene.size]))
    travel = IMAGE_SIZE / 2 - side / 2 - MARGIN
    x, y = POSITIONS[scene.position]
    centre = (
        IMAGE_SIZE / 2 + x * travel + float(rng.uniform(-4, 4)),
        IMAGE_SIZE / 2 + y * travel + float(rng.uniform(-4, 4)),
    )
    return paint(scene.background, [(scene.colour, mask(scene.shape, side, centre, float(rng.uniform(-3, 3))))], rng)


def paint(background: str, objects: Sequence[tuple[str, Mask]], rng: np.random.Generator) -> Pixels:
    """`objects`, each a colour and where it covers, on `background`, all colours slightly off: (256, 256, 3) uint8."""
    fronts = [np.asarray(COLOURS[colour], dtype=np.float32) + rng.uniform(-6, 6, 3) for colour, _ in objects]
    back = np.asarray(BACKGROUNDS[background], dtype=np.float32) + rng.uniform(-3, 3, 3)
    picture = np.broadcast_to(back, (IMAGE_SIZE, IMAGE_SIZE, 3))
    for front, (_, coverage) in zip(fronts, objects, strict=True):
        picture = coverage[..., None] * front + (1.0 - coverage[..., None]) * picture
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def split(*, held_out: bool) -> list[Scene]:
    """The scenes of the training (`held_out=False`) or of the evaluation."""
    return [scene for scene in all_scenes() if scene.held_out is held_out]


def draw_scenes(scenes: Sequence[Scene], count: int, rng: np.random.Generator) -> list[Scene]:
    """`count` scenes: whole shuffled passes, so that every combination is seen equally often."""
    order: list[int] = []
    while len(order) < count:
        order.extend(rng.permutation(len(scenes)).tolist())
    return [scenes[index] for index in order[:count]]
