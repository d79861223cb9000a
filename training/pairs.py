"""Two-object scenes with a relation: `a red circle left of a blue square on a white background`.

Both objects have one size; what is to be learned is which is where. The split is the scenes' own: a tenth of all
combinations is kept for the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, INVISIBLE, SHAPES, Pixels, article, kept_back, mask, paint

RELATIONS: dict[str, tuple[int, int]] = {  # where the first object lies, seen from the picture's middle
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
SIDE = (88, 100)  # pixels of each object's box
DISTANCE = 60  # pixels from the middle to each object's centre


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One of the two objects."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the picture shows, in the words of its caption."""

    first: Thing
    second: Thing
    relation: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether the combination belongs to the evaluation (about one in ten); the reverse is the same picture."""
        same = min(self, self.reverse, key=lambda pair: pair.relation)
        return kept_back(f"{same.first}/{same.relation}/{same.second}/{same.background}")

    @property
    def reverse(self) -> Pair:
        """The same picture said the other way round."""
        x, y = RELATIONS[self.relation]
        opposite = next(name for name, place in RELATIONS.items() if place == (-x, -y))
        return Pair(first=self.second, second=self.first, relation=opposite, background=self.background)


def _draw(rng: np.random.Generator) -> Pair:
    def one(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    while True:
        background = one(tuple(BACKGROUNDS))
        visible = [colour for colour in COLOURS if (colour, background) not in INVISIBLE]
        first, second = (Thing(shape=one(SHAPES), colour=one(visible)) for _ in range(2))
        if first != second:  # of two equal things neither is the left one
            return Pair(first=first, second=second, relation=one(tuple(RELATIONS)), background=background)


def draw_pairs(count: int, rng: np.random.Generator, *, held_out: bool) -> list[Pair]:
    """`count` random pairs of the training (`held_out=False`) or of the evaluation."""
    pairs: list[Pair] = []
    while len(pairs) < count:
        pair = _draw(rng)
        if pair.held_out is held_out:
            pairs.append(pair)
    return pairs


def caption(pair: Pair, rng: np.random.Generator | None = None) -> str:
    """A caption of `pair`; without `rng` the plain form that the evaluation uses."""
    text = f"{pair.first} {pair.relation} {pair.second}"
    form = 0 if rng is None else int(rng.integers(5))
    if form == 4:
        return caption(pair.reverse)
    if form == 3:
        return f"{pair.background} background, {text}"
    return f"{text} on {article(pair.background)} {pair.background} background"


def render(pair: Pair, rng: np.random.Generator) -> Pixels:
    """A picture of `pair` with slight jitter in place, size, turn and colour: (256, 256, 3) uint8."""
    x, y = RELATIONS[pair.relation]
    objects = []
    for thing, sign in ((pair.first, 1), (pair.second, -1)):
        centre = (
            IMAGE_SIZE / 2 + sign * x * DISTANCE + float(rng.uniform(-4, 4)),
            IMAGE_SIZE / 2 + sign * y * DISTANCE + float(rng.uniform(-4, 4)),
        )
        turn = float(rng.uniform(-3, 3))
        objects.append((thing.colour, mask(thing.shape, float(rng.uniform(*SIDE)), centre, turn)))
    return paint(pair.background, objects, rng)
