"""Counts rows that share an id, in bounded memory: ids are data and may repeat."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MAX_IDS_COMPARED = 4_000_000
"""Rows that are compared, at 8 bytes each."""


class IdCounter:
    """Counts rows with the id of an earlier row, among the first `limit` rows, by 64-bit hashes of the ids."""

    def __init__(self, limit: int = MAX_IDS_COMPARED) -> None:
        self.compared = 0
        self._limit = limit
        self._hashes: list[NDArray[np.int64]] = []

    def add(self, ids: pa.Array) -> None:
        """Add some rows' ids."""
        left = self._limit - self.compared
        if left > 0:
            hashes = np.fromiter(map(hash, ids[:left].to_pylist()), np.int64)
            self._hashes.append(hashes)
            self.compared += len(hashes)

    def duplicates(self) -> int:
        """Rows that are not the first with their id."""
        if not self._hashes:
            return 0
        return self.compared - len(np.unique(np.concatenate(self._hashes)))
