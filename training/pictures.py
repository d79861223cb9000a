"""An endless stream of training pictures for the first stage: half icons, a quarter scenes, a quarter pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training import architecture, icons, pairs, scenes
from training.common import to_tensor
from training.scenes import IMAGE_SIZE, Pixels

CROPS_PER_PICTURE = 2


class Pictures:
    """The stream; what comes is fixed by `rng`."""

    def __init__(self, work: Path, rng: np.random.Generator, *, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out
        self.sprites = icons.load_sprites(work / "npm")
        self.scenes = scenes.split(held_out=held_out)

    def draw(self, kind: str) -> Pixels:
        """One picture of `kind`: scene, pair or icon."""
        if kind == "icon":
            (icon,) = icons.draw_icons(list(icons.NAMES), 1, self.rng)
            return icons.render(icon, self.sprites, self.rng)
        if kind == "pair":
            (pair,) = pairs.draw_pairs(1, self.rng, held_out=self.held_out)
            return pairs.render(pair, self.rng)
        (scene,) = scenes.draw_scenes(self.scenes, 1, self.rng)
        return scenes.render(scene, self.rng)

    def whole(self, count: int) -> Tensor:
        """`count` pictures: (count, 3, 256, 256) in [-1, 1]."""
        kinds = self.rng.choice(("icon", "icon", "scene", "pair"), count)
        tensor = to_tensor([self.draw(kind) for kind in kinds.tolist()])
        return tensor.contiguous(memory_format=torch.channels_last)

    def corners(self, count: int, side: int) -> list[tuple[int, int]]:
        """The top left corners of `count` random squares of `side` pixels, at whole cells of the latents."""
        cells = (IMAGE_SIZE - side) // architecture.FACTOR + 1
        return [(int(y), int(x)) for y, x in self.rng.integers(0, cells, (count, 2)) * architecture.FACTOR]
