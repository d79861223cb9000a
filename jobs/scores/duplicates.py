"""Pictures that look alike: pairs of hashes that differ in few bits, found without comparing all with all.

Two hashes that differ in at most d of 64 bits agree in at least one of d + 1 bands of their bits, so only hashes that
share a band are compared. What is the same hash is one for all its pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from latentmill.jobs.manifests.fields import shorten

MAX_PAIRS = 1000
"""Pairs that are listed, the nearest first; all are counted."""
MAX_COMPARISONS = 200_000_000
"""Some ten seconds of one core."""

_BITS = 64
_HASH = re.compile(r"[0-9a-f]{16}", re.ASCII)
_AT_ONCE = 1 << 20
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)

Hashes = NDArray[np.uint64]
Ordinals = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class NearPair:
    """Two samples whose pictures look alike; `distance` is in how many bits their hashes differ."""

    first: str
    second: str
    distance: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """What looks alike among `pictures`, `distance` bits apart at most.

    A picture with the hash of an earlier one is paired with the first of them, and counts no further. `not_compared` is
    None, or says why only the same hashes were looked for.
    """

    distance: int
    pictures: int
    total: int
    pairs: tuple[NearPair, ...]
    not_compared: str | None = None


def find_duplicates(
    sample_ids: Sequence[str], digits: Sequence[str], distance: int, *, most: int = MAX_COMPARISONS
) -> Duplicates:
    """The pairs among these samples, nearest first, by hashes of 16 hexadecimal digits.

    Memory grows with the samples, not with the pairs. Raises ValueError for any other hash.
    """
    wrong = next((hash_ for hash_ in digits if not _HASH.fullmatch(hash_)), None)
    if wrong is not None:
        raise ValueError(f"{shorten(wrong)} is no hash of 16 hexadecimal digits")
    hashes: Hashes = np.frombuffer(bytes.fromhex("".join(digits)), dtype=">u8").astype(np.uint64)
    ordinals: Ordinals = np.array(list(map(int, sample_ids)), dtype=np.int64)
    order = np.argsort(ordinals, kind="stable")
    ordinals, hashes = ordinals[order], hashes[order]
    different, firsts, which = np.unique(hashes, return_index=True, return_inverse=True)
    nearest = _Nearest()
    others = np.setdiff1d(np.arange(len(hashes)), firsts, assume_unique=True)
    nearest.add(0, ordinals[firsts[which[others]]], ordinals[others])
    bands = _bands(distance + 1)
    comparisons = sum(_pairs_of(different & mask) for mask in bands)
    not_compared = None
    if distance and comparisons > most:
        not_compared = f"{comparisons:,} comparisons are needed, and the limit is {most:,}; ask for a smaller distance"
    elif distance:
        for number, mask in enumerate(bands):
            _compare(different, ordinals[firsts], bands[:number], mask, distance, nearest)
    return Duplicates(
        distance=distance,
        pictures=len(hashes),
        total=nearest.total,
        pairs=nearest.pairs(width=len(sample_ids[0]) if sample_ids else 0),
        not_compared=not_compared,
    )


def _bands(count: int) -> list[np.uint64]:
    """Masks that share the bits among them evenly."""
    ends = [_BITS * number // count for number in range(count + 1)]
    return [np.uint64((1 << end) - (1 << start)) for start, end in pairwise(ends)]


def _pairs_of(keys: Hashes) -> int:
    sizes = np.unique(keys, return_counts=True)[1].astype(object)  # Python's numbers, which do not overflow
    return int((sizes * (sizes - 1) // 2).sum()) if len(sizes) else 0


def _compare(
    hashes: Hashes, ordinals: Ordinals, before: list[np.uint64], mask: np.uint64, distance: int, nearest: _Nearest
) -> None:
    """Add the pairs that agree in this band, and in none before."""
    order = np.argsort(hashes & mask, kind="stable")
    hashes, ordinals = hashes[order], ordinals[order]
    keys = hashes & mask
    left, apart = np.arange(len(hashes)), 1
    while True:
        left = left[left + apart < len(hashes)]
        left = left[
            keys[left] == keys[left + apart]
        ]  # sorted by key, who has no neighbour so far away has none farther
        if not len(left):
            return
        for start in range(0, len(left), _AT_ONCE):
            one = left[start : start + _AT_ONCE]
            two = one + apart
            differing = hashes[one] ^ hashes[two]
            bits = _ONES[differing.view(np.uint8)].reshape(-1, 8).sum(axis=1)
            near = bits <= distance
            for earlier in before:
                near &= (differing & earlier) != 0
            for bit in np.unique(bits[near]):
                found = near & (bits == bit)
                nearest.add(int(bit), ordinals[one[found]], ordinals[two[found]])
        apart += 1


class _Nearest:
    """The nearest pairs of those that are added, and how many there were."""

    def __init__(self) -> None:
        self.total = 0
        self._kept: list[tuple[int, int, int]] = []

    def add(self, distance: int, one: Ordinals, two: Ordinals) -> None:
        self.total += len(one)
        least, most = np.minimum(one, two), np.maximum(one, two)
        order = np.lexsort((most, least))[:MAX_PAIRS]
        self._kept += [(distance, int(a), int(b)) for a, b in zip(least[order], most[order], strict=True)]
        if len(self._kept) > 4 * MAX_PAIRS:
            self._kept = sorted(self._kept)[:MAX_PAIRS]

    def pairs(self, *, width: int) -> tuple[NearPair, ...]:
        kept = sorted(self._kept)[:MAX_PAIRS]
        return tuple(
            NearPair(first=f"{one:0{width}d}", second=f"{two:0{width}d}", distance=distance)
            for distance, one, two in kept
        )
