"""How much work each chunk of a plan is, and how much is left, by arithmetic over groups: never a list of chunks.

The unit is one pixel through one run of the denoiser. What a machine makes of it is measured (jobs/speed.py); the
arithmetic only says how chunks compare that have not been seen yet.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from latentmill.engine import count_passes
from latentmill.jobs.plans.grid import Grid, Group
from latentmill.jobs.speed import WorkLeft

PASSES_BESIDE = 2.5
"""What a picture costs beside its denoising, in unguided runs of the denoiser: 3.7 with the embedded model, measured on
a CPU; 1.8 with SD 1.5, by the operations of its autoencoder."""


def pixels_of(shape: tuple[int, int, bool]) -> float:
    """Pixels of a picture, twice if it is guided."""
    width, height, guided = shape
    return float(width * height * (2 if guided else 1))


class ChunkWork:
    """The work of a plan's chunks. Their kinds are the groups of the grid; where groups meet, the last one counts."""

    def __init__(self, grid: Grid, batch_size: int) -> None:
        self._grid = grid
        self._batch_size = batch_size
        self.models: NDArray[np.int64] = np.array([group.model for group in grid.groups], dtype=np.int64)
        """The model of each kind."""
        self._first_kind: dict[int, int] = {}
        kinds = 0
        for section in grid.sections:
            self._first_kind[section.first_chunk] = kinds
            kinds += len(section.groups)
        self._whole: dict[int, float] = {}

    def of(self, chunk: int) -> tuple[int, float]:
        """The chunk's kind and its work."""
        section, start, stop = self._grid.section_of(chunk)
        number = bisect_right(section.groups, stop - 1, key=lambda group: group.first) - 1
        kind, group = self._first_kind[section.first_chunk] + number, section.groups[number]
        if group.first <= start and stop - start == self._grid.chunk_size:
            return kind, self._of_whole(kind, group)
        groups = [piece for piece, first, last in section.cut(start, stop) for _ in range(first, last)]
        return kind, self._of_groups(groups)

    def left(self, still_open: NDArray[np.bool_]) -> WorkLeft:
        """What the open chunks are; `still_open` has one entry per chunk."""
        chunks, work = np.zeros(len(self.models), dtype=np.int64), np.zeros(len(self.models))
        size, kind = self._grid.chunk_size, 0
        for section in self._grid.sections:
            looked_at: set[int] = set()
            for group in section.groups:
                end = group.first + group.n_samples
                first, last = -(-group.first // size), end // size
                whole = int(np.count_nonzero(still_open[section.first_chunk + first : section.first_chunk + last]))
                if whole:
                    chunks[kind] += whole
                    work[kind] += whole * self._of_whole(kind, group)
                looked_at |= {place // size for place in (group.first, end) if place % size}
                kind += 1
            for chunk in (section.first_chunk + number for number in looked_at):
                if still_open[chunk]:
                    its_kind, its_work = self.of(chunk)
                    chunks[its_kind] += 1
                    work[its_kind] += its_work
        return WorkLeft(chunks, work)

    def _of_whole(self, kind: int, group: Group) -> float:
        if kind not in self._whole:
            self._whole[kind] = self._of_groups([group] * self._grid.chunk_size)
        return self._whole[kind]

    def _of_groups(self, groups: list[Group]) -> float:
        """The work of a chunk whose samples are of these groups."""
        width, height, guided = groups[0].key[:3]
        n_batches = -(-len(groups) // self._batch_size)
        n_passes = count_passes([group.loop for group in groups], self._batch_size)
        denoising = n_passes * pixels_of((width, height, guided))
        return self._batch_size * (denoising + n_batches * PASSES_BESIDE * width * height)
