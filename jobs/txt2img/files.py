"""The output files of the original command: pictures numbered from the existing ones, and one grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.ledger.pictures import encode_png

PADDING = 2
"""Black pixels around and between the pictures of a grid."""


class OutputFolder:
    """`outdir` with its folder `samples`. Both counts are taken once, at the start, as the original does.

    Afterwards every number is used once, and a file that exists is never touched.
    """

    def __init__(self, outdir: Path) -> None:
        self.path = outdir
        self.samples = outdir / "samples"
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self._next_sample = len(list(self.samples.iterdir()))
            self._next_grid = len(list(outdir.iterdir())) - 1
        except OSError as error:
            raise UsageError(f"--outdir {outdir} cannot be used: {error.strerror or error}") from None

    def save_sample(self, pixels: Pixels) -> Path:
        """Write a picture under the next free number of five digits."""
        path, self._next_sample = _save_as_next(self.samples, "{:05}.png", self._next_sample, pixels)
        return path

    def save_grid(self, pixels: Pixels) -> Path:
        """Write a grid under the next free number of four digits."""
        path, self._next_grid = _save_as_next(self.path, "grid-{:04}.png", self._next_grid, pixels)
        return path


def _save_as_next(folder: Path, pattern: str, number: int, pixels: Pixels) -> tuple[Path, int]:
    data = encode_png(pixels)
    while True:
        path = folder / pattern.format(number)
        number += 1
        try:
            file = path.open("xb")
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            with file:
                file.write(data)
        except OSError as error:
            path.unlink()
            raise _unwritable(path, error) from None
        return path, number


def _unwritable(path: Path, error: OSError) -> JobError:
    return JobError(f"{path} cannot be written: {error.strerror or error}")


def grid_size(count: int, per_row: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) of the grid of `count` pictures of one size; one picture alone has no border."""
    if count == 1:
        return width, height
    columns = min(per_row, count)
    rows = -(-count // columns)
    return columns * (width + PADDING) + PADDING, rows * (height + PADDING) + PADDING


def draw_grid(pictures: Sequence[Pixels], per_row: int) -> Pixels:
    """All pictures `(h, w, 3) uint8` in reading order on black, `per_row` of them in a row."""
    if len(pictures) == 1:
        return pictures[0]
    height, width = pictures[0].shape[:2]
    grid_width, grid_height = grid_size(len(pictures), per_row, width, height)
    grid = np.zeros((grid_height, grid_width, 3), np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, min(per_row, len(pictures)))
        top, left = row * (height + PADDING) + PADDING, column * (width + PADDING) + PADDING
        grid[top : top + height, left : left + width] = picture
    return grid
