"""An endless stream of training pictures for the first stage: half icons, a quarter scenes, a quarter pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training import architecture, icons, pairs, scenes
from training.common import to_tensor
from training.devices import device, drawn_by_others, renderers
from training.scenes import IMAGE_SIZE, Pixels

CROPS_PER_PICTURE = 2
BLOCK = 8  # pictures that another process draws at a time


class Pictures:
    """The stream; what comes is fixed by `rng`."""

    def __init__(self, work: Path, rng: np.random.Generator, *, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out
        self.sprites = icons.load_sprites(work / "npm")
        self.scenes = scenes.split(held_out=held_out)
        self.ahead: Iterator[Tensor] | None = None

    def start_over(self, seed: Sequence[int]) -> None:
        """What comes from now on is fixed by `seed`; where there is a GPU, other processes draw it ahead."""
        self.rng = np.random.default_rng(seed)
        if renderers():
            self.ahead = drawn_by_others(_Ahead(self, seed), None)

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

    def pixels(self, count: int) -> list[Pixels]:
        """`count` pictures, `(256, 256, 3) uint8`."""
        kinds = self.rng.choice(("icon", "icon", "scene", "pair"), count)
        return [self.draw(kind) for kind in kinds.tolist()]

    def whole(self, count: int) -> Tensor:
        """`count` pictures: (count, 3, 256, 256) in [-1, 1], on the device."""
        if self.ahead is None:
            drawn = torch.from_numpy(np.stack(self.pixels(count))).to(device())
        else:
            drawn = torch.cat([next(self.ahead).to(device()) for _ in range(-(-count // BLOCK))])[:count]
        return to_tensor(drawn).contiguous(memory_format=torch.channels_last)

    def corners(self, count: int, side: int) -> list[tuple[int, int]]:
        """The top left corners of `count` random squares of `side` pixels, at whole cells of the latents."""
        cells = (IMAGE_SIZE - side) // architecture.FACTOR + 1
        return [(int(y), int(x)) for y, x in self.rng.integers(0, cells, (count, 2)) * architecture.FACTOR]


class _Ahead(IterableDataset[Tensor]):
    """Blocks of pictures, `(BLOCK, 256, 256, 3) uint8`, for another process to draw."""

    def __init__(self, pictures: Pictures, seed: Sequence[int]) -> None:
        self.pictures, self.seed = pictures, seed

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        self.pictures.rng = np.random.default_rng([*self.seed, worker.id if worker else 0])
        while True:
            yield torch.from_numpy(np.stack(self.pictures.pixels(BLOCK)))
