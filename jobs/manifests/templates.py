"""Prompts as templates: `{a|b}`, `{2$$a|b|c}`, `{2::a|b}`, `__wildcard__`, as web UIs' dynamic prompts have them.

This module reads their text; template_tree.py says which texts they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.manifests.template_tree import Chain, Choice, Literal, Node

MAX_DEPTH = 100
"""How deep braces and wildcards may be nested, one in another."""

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


def parse_template(text: str, wildcard: Callable[[str, int], Choice], depth: int = 0) -> Node:
    """The tree of a template. `wildcard` gives the lines of a wildcard as a choice, for its name and depth.

    Raises TemplateError for a brace that is not closed, and for what is nested deeper than MAX_DEPTH.
    """
    parser = _Parser(text, wildcard)
    node = parser.sequence(depth, inside=False)
    if parser.at < len(text):  # only an unopened brace ends a sequence early
        raise TemplateError(f"the template closes a brace at character {parser.at + 1} that none opens; write \\}}")
    return node


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
