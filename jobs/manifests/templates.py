"""Prompts as templates: `{a|b}`, `{2$$a|b|c}`, `{2::a|b}`, `__wildcard__`, as web UIs' dynamic prompts have them.

A template is a tree that knows how many texts it stands for and how long the longest is, by arithmetic, before any of
them is made. One of them is made by its number, or drawn by a seed.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

from latentmill.jobs.manifests.fields import shorten

MAX_DEPTH = 100
"""How deep braces and wildcards may be nested, one in another."""

COUNT_LIMIT = 10**15
"""Where counting stops: no job has so many samples."""

MAX_VARIANTS = 1_000_000
"""The most texts that one row's template may stand for where all of them are drawn."""

_MAX_CHOSEN = 100
"""The most options that one choice takes."""

_DEFAULT_SEPARATOR = ", "
_SPECIAL = re.compile(
    r"\\(?P<escaped>[{}|]|__)|(?P<brace>[{}|])|(?P<variable>\$\{)"
    r"|__(?P<wildcard>[^_\s{}|](?:[^_\s{}|]|_(?!_)| (?=[^_\s{}|]))*)__"
)
_CHOSEN = re.compile(r"\s*(?P<low>\d{1,6})?(?P<range>-)?(?P<high>\d{1,6})?\$\$")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)::")


class TemplateError(ValueError):
    """A text that is no template; the message says where and what to do."""


class TooDeepError(TemplateError):
    """A template or its wildcards are nested too deep."""


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
    low: int = 1
    high: int = 1
    separator: str = _DEFAULT_SEPARATOR

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


def parse_template(text: str, wildcard: Callable[[str, int], Choice], depth: int = 0) -> Node:
    """The tree of a template. `wildcard` gives the lines of a wildcard as a choice, for its name and depth.

    Raises TemplateError for a brace that is not closed, and for what is nested deeper than MAX_DEPTH.
    """
    parser = _Parser(text, wildcard)
    node = parser.sequence(depth, inside=False)
    if parser.at < len(text):  # only an unopened brace ends a sequence early
        raise TemplateError(f"the template closes a brace at character {parser.at + 1} that none opens; write \\}}")
    return node


def draw_template(node: Node, text: str, seed: int) -> str:
    """One of the texts, always the same for the same template and seed, whatever the version of Python."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return node.draw(random.Random(int.from_bytes(digest)))  # noqa: S311 - to be repeated, not to be secret


class _Parser:
    def __init__(self, text: str, wildcard: Callable[[str, int], Choice]) -> None:
        self.at = 0
        self._text = text
        self._wildcard = wildcard

    def sequence(self, depth: int, *, inside: bool) -> Node:
        """Up to the end, or to the `|` or `}` that ends it."""
        parts: list[Node] = []
        literal = ""
        while (found := _SPECIAL.search(self._text, self.at)) is not None:
            literal += self._text[self.at : found.start()]
            if found["brace"] is not None and found["brace"] != "{":
                if inside or found["brace"] == "}":
                    self.at = found.start()
                    return _joined(parts, literal)
                literal += found["brace"]  # a bar outside of braces is a bar
                self.at = found.end()
                continue
            if found["variable"] is not None:
                raise TemplateError("variables (${...}) are not known here; write their value, or \\{ for a brace")
            self.at = found.end()
            if found["escaped"] is not None:
                literal += found["escaped"]
                continue
            parts.append(Literal(literal))
            literal = ""
            if depth >= MAX_DEPTH:
                raise TooDeepError(f"the template is nested deeper than {MAX_DEPTH}; flatten it")
            parts.append(
                self._choice(found.start(), depth) if found["brace"] else self._lines(found["wildcard"], depth)
            )
        literal += self._text[self.at :]
        self.at = len(self._text)
        return _joined(parts, literal)

    def _lines(self, name: str, depth: int) -> Choice:
        lines = self._wildcard(name, depth + 1)
        if depth + lines.depth > MAX_DEPTH:
            raise TooDeepError(f"the template is nested deeper than {MAX_DEPTH} at __{name}__; flatten it")
        return lines

    def _choice(self, start: int, depth: int) -> Choice:
        """What is between braces, from behind the opening one."""
        low = high = 1
        separator = _DEFAULT_SEPARATOR
        chosen = _CHOSEN.match(self._text, self.at)
        if chosen is not None and any(chosen[name] for name in ("low", "range", "high")):
            self.at = chosen.end()
            low, high = _bounds(chosen)
            end = self._text.find("$$", self.at)
            if end >= 0 and not re.search(r"[{}|]", self._text[self.at : end]):
                separator, self.at = self._text[self.at : end], end + 2
        options: list[Node] = []
        weights: list[float] = []
        while True:
            weight = _WEIGHT.match(self._text, self.at)
            self.at = weight.end() if weight else self.at
            weights.append(float(weight[1]) if weight else 1.0)
            options.append(self.sequence(depth + 1, inside=True))
            if self.at == len(self._text):
                raise TemplateError(
                    f"the brace at character {start + 1} of the template is never closed; write }} or \\{{"
                )
            self.at += 1
            if self._text[self.at - 1] == "}":
                return _choice(options, weights, low, high, separator)


def _bounds(found: re.Match[str]) -> tuple[int, int]:
    low = int(found["low"] or 1)
    high = int(found["high"] or _MAX_CHOSEN) if found["range"] else low
    if low > high:
        raise TemplateError(f"{shorten(found[0].strip())} in the template has its ends the wrong way round")
    return low, min(high, _MAX_CHOSEN)


def _choice(options: list[Node], weights: list[float], low: int, high: int, separator: str) -> Choice:
    if len(options) == 1 and isinstance(options[0], Choice) and (low, high) != (1, 1) and options[0].high == 1:
        lines = options[0]  # several lines of one wildcard, none twice
        options, weights = list(lines.options), list(lines.weights)
    if not sum(weights):
        raise TemplateError("all options between two braces of the template have the weight 0; give one of them more")
    high = min(high, len(options))
    return Choice(tuple(options), tuple(weights), min(low, high), high, separator)


def choice_of_lines(lines: Sequence[str], wildcard: Callable[[str, int], Choice], depth: int) -> Choice:
    """A wildcard's lines, each a template that may begin with a weight."""
    options: list[Node] = []
    weights: list[float] = []
    for line in lines:
        weight = _WEIGHT.match(line)
        weights.append(float(weight[1]) if weight else 1.0)
        options.append(parse_template(line[weight.end() :] if weight else line, wildcard, depth))
    return _choice(options, weights, 1, 1, _DEFAULT_SEPARATOR)


def _joined(parts: list[Node], literal: str) -> Node:
    kept = [part for part in [*parts, Literal(literal)] if not (isinstance(part, Literal) and not part.value)]
    return kept[0] if len(kept) == 1 else Chain(tuple(kept))
