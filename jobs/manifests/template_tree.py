"""A template as a tree: how many texts it stands for, how long the longest is, and each of them by number or seed.

The numbers come by arithmetic, before any text is made.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

COUNT_LIMIT = 10**15
"""Where counting stops: no job has so many samples."""


class Node(Protocol):
    """A part of a template: a literal text, several parts in a row, or a choice."""

    @property
    def count(self) -> int:
        """How many texts it stands for, at most COUNT_LIMIT."""
        ...

    @property
    def longest(self) -> int:
        """Bytes of the longest of them."""
        ...

    @property
    def depth(self) -> int: ...

    def text(self, number: int) -> str:
        """The text with that number, from 0 on."""
        ...

    def draw(self, rng: random.Random) -> str:
        """Any of the texts."""
        ...

    def longest_text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Literal:
    """A text that stands for itself."""

    value: str
    count: int = 1
    depth: int = 0

    @property
    def longest(self) -> int:
        """Its bytes."""
        return len(self.value.encode())

    def text(self, number: int) -> str:  # noqa: ARG002 - there is only one
        """Itself."""
        return self.value

    def draw(self, rng: random.Random) -> str:  # noqa: ARG002 - there is only one
        """Itself."""
        return self.value

    def longest_text(self) -> str:
        """Itself."""
        return self.value


@dataclass(frozen=True)
class Chain:
    """Parts one after the other; the last one varies fastest."""

    parts: tuple[Node, ...]

    @cached_property
    def count(self) -> int:
        """The product of its parts' counts."""
        product = 1
        for part in self.parts:
            product = min(COUNT_LIMIT, product * part.count)
        return product

    @cached_property
    def longest(self) -> int:
        """The sum over its parts."""
        return sum(part.longest for part in self.parts)

    @cached_property
    def depth(self) -> int:
        """That of its deepest part."""
        return max((part.depth for part in self.parts), default=0)

    def text(self, number: int) -> str:
        """By mixed radices."""
        made: list[str] = []
        for part in reversed(self.parts):
            number, digit = divmod(number, part.count)
            made.append(part.text(digit))
        return "".join(reversed(made))

    def draw(self, rng: random.Random) -> str:
        """Each part drawn in turn."""
        return "".join(part.draw(rng) for part in self.parts)

    def longest_text(self) -> str:
        """The longest of each part."""
        return "".join(part.longest_text() for part in self.parts)


@dataclass(frozen=True)
class Choice:
    """`low` to `high` of the options, each at most once, in any order, with a separator between them.

    Weights say how likely an option is when it is drawn; they do not count when all texts are made.
    """

    options: tuple[Node, ...]
    weights: tuple[float, ...]
    low: int
    high: int
    separator: str

    @cached_property
    def count(self) -> int:
        """Over all lengths, all ordered choices of so many options, times what each of them stands for."""
        return min(COUNT_LIMIT, sum(self._counts))

    @cached_property
    def longest(self) -> int:
        """The `high` longest options, with separators."""
        longest = heapq.nlargest(self.high, (option.longest for option in self.options))
        return sum(longest) + len(self.separator.encode()) * max(0, self.high - 1)

    @cached_property
    def depth(self) -> int:
        """One more than its deepest option."""
        return 1 + max(option.depth for option in self.options)

    def text(self, number: int) -> str:
        """By number of options, then by the first option, then by the next; for each, by its own number."""
        if self.low == self.high == 1:
            index = bisect_right(self._ends, number)
            return self.options[index].text(number - (self._ends[index - 1] if index else 0))
        length = 0
        while number >= self._counts[length]:
            number -= self._counts[length]
            length += 1
        return self.separator.join(self._chosen(self.low + length, number))

    def draw(self, rng: random.Random) -> str:
        """Options drawn one after the other by their weights, none twice."""
        length = self.low + int(rng.random() * (self.high - self.low + 1))
        left = list(range(len(self.options)))
        texts: list[str] = []
        for _ in range(length):
            ends = list(accumulate(self.weights[index] for index in left)) if texts else self._weight_ends
            place = min(bisect_right(ends, rng.random() * ends[-1]), len(left) - 1)
            texts.append(self.options[left.pop(place)].draw(rng))
        return self.separator.join(texts)

    def longest_text(self) -> str:
        """The `high` longest options."""
        longest = heapq.nlargest(self.high, self.options, key=lambda option: option.longest)
        return self.separator.join(option.longest_text() for option in longest)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(option.count for option in self.options))

    @cached_property
    def _weight_ends(self) -> list[float]:
        return list(accumulate(self.weights))

    @cached_property
    def _counts(self) -> list[int]:
        """For each length from `low` to `high`, how many texts have so many options."""
        if self.high == 1:
            return [1] * (1 - self.low) + [self._ends[-1]]
        if _ordered_choices(len(self.options), self.high) >= COUNT_LIMIT:
            return [COUNT_LIMIT] * (self.high - self.low + 1)
        sums = self._sums
        return [math.factorial(length) * sums[length] for length in range(self.low, self.high + 1)]

    @cached_property
    def _sums(self) -> list[int]:
        """Elementary symmetric polynomials of the options' counts: the sum over all sets of 0, 1, 2... options."""
        sums = [1] + [0] * self.high
        for option in self.options:
            for size in range(self.high, 0, -1):
                sums[size] += sums[size - 1] * option.count
        return sums

    def _chosen(self, length: int, number: int) -> list[str]:
        left, sums = list(range(len(self.options))), self._sums
        texts: list[str] = []
        for remaining in range(length - 1, -1, -1):
            for place, index in enumerate(left):
                count = self.options[index].count
                without = _without(sums, count, remaining)
                ways = math.factorial(remaining) * without[remaining]
                if number < count * ways:
                    digit, number = divmod(number, ways)
                    texts.append(self.options[index].text(digit))
                    sums = without
                    left.pop(place)
                    break
                number -= count * ways
        return texts


def _ordered_choices(options: int, length: int) -> int:
    """A lower bound on the texts of so many options, which stops at COUNT_LIMIT."""
    product = 1
    for step in range(length):
        product *= options - step
        if product >= COUNT_LIMIT:
            return COUNT_LIMIT
    return product


def _without(sums: Sequence[int], count: int, size: int) -> list[int]:
    """The sums of `_sums` up to that size once an option of that count has left."""
    left = [1]
    for number in range(1, size + 1):
        left.append(sums[number] - count * left[-1])
    return left


def draw_template(node: Node, text: str, seed: int) -> str:
    """One of the texts, always the same for the same template and seed, whatever the version of Python."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return node.draw(random.Random(int.from_bytes(digest)))  # noqa: S311 - to be repeated, not to be secret
