"""How much of a known watermark must be read back before it is no accident."""

from __future__ import annotations

import math
from functools import lru_cache

CHANCE = 10**6
"""A watermark counts as found if no more than one picture without it in so many would match as well."""


@lru_cache(maxsize=64)
def bits_needed(n_bits: int) -> int | None:
    """How many of a known watermark's bits must be read back: 96 of 136. None if even all of them may be chance.

    The bits of a picture without it are fair coins: the smallest k with P(X >= k) <= 1 / CHANCE, X ~ Binomial(n, 1/2).
    """
    ways = 0
    for k in range(n_bits, -1, -1):
        ways += math.comb(n_bits, k)
        if ways * CHANCE > 2**n_bits:
            return None if k == n_bits else k + 1
    return 0


def matching_bits(accuracy: float, n_bits: int) -> int:
    """The number of bits behind a share of them."""
    return round(accuracy * n_bits)
