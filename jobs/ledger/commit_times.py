"""When each chunk was committed, by the store's clock and listings alone: looked up again and again, at little cost."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.ledger.ledger import PER_FOLDER, chunk_of_path, repair_of_path
from latentmill.jobs.store.storage import Storage

_THREADS = 16


class CommitTimes:
    """The commits of an output as they were last seen.

    A folder that is full, or not there, is not listed: what a look costs is a request for the names of the folders, and
    one for each of those that are being filled.
    """

    def __init__(self, storage: Storage, n_chunks: int) -> None:
        self._storage = storage
        self.times: NDArray[np.float64] = np.full(n_chunks, np.nan)
        """Seconds since 1970 by chunk; NaN where a chunk is open."""
        self.repairs: dict[int, int] = {}
        """The highest number of a repair by chunk, as far as its folder was listed since."""

    @property
    def committed(self) -> NDArray[np.bool_]:
        """One flag per chunk."""
        return ~np.isnan(self.times)

    def look(self) -> list[int]:
        """The chunks that were committed since the last look."""
        before = self.committed
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._list, self._being_filled()):
                pass
        new: list[int] = np.flatnonzero(self.committed & ~before).tolist()
        return new

    def _being_filled(self) -> Iterable[int]:
        for name in self._storage.folders("ledger"):
            folder = int(name) if name.isascii() and name.isdecimal() else -1
            inside = self.times[folder * PER_FOLDER : (folder + 1) * PER_FOLDER] if folder >= 0 else self.times[:0]
            if np.isnan(inside).any():
                yield folder

    def _list(self, folder: int) -> None:
        for path, moment in self._storage.list_modified(f"ledger/{folder:05d}"):
            chunk = chunk_of_path(path)
            if chunk is not None and chunk < len(self.times):
                self.times[chunk] = moment
            repair = repair_of_path(path)
            if repair is not None and repair[0] < len(self.times):
                self.repairs[repair[0]] = max(repair[1], self.repairs.get(repair[0], 0))
