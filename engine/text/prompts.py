"""Emphasis in prompts: from brackets to weighted pieces of text. The syntax is the user's explicit choice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from latentmill.engine.types import PROMPT_SYNTAXES, EngineError


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text with the weight of its embeddings. `starts_chunk` marks the text after a BREAK."""

    text: str
    weight: float = 1.0
    starts_chunk: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Syntax:
    """Opening bracket -> (closing bracket, factor); which bracket takes `:number`; whether BREAK starts a chunk."""

    brackets: Mapping[str, tuple[str, float]]
    weighted: str
    breaks: bool


_SYNTAXES = MappingProxyType(
    {
        "a1111": _Syntax(brackets={"(": (")", 1.1), "[": ("]", 1 / 1.1)}, weighted="(", breaks=True),
        "novelai": _Syntax(brackets={"{": ("}", 1.05), "[": ("]", 1 / 1.05)}, weighted="", breaks=False),
    }
)

_NUMBER_THEN_CLOSE = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_prompt(text: str, syntax: str) -> list[Piece]:
    """The prompt as weighted pieces, in order; joined, they are the text that is encoded.

    `plain` takes every character literally. `a1111`: `(x)` weighs 1.1, `[x]` 1/1.1, `(x:1.3)` 1.3, brackets nest and
    multiply, a backslash before a bracket makes it text, BREAK starts a new chunk of 75 tokens. `novelai`: `{x}` weighs
    1.05, `[x]` 1/1.05. A bracket that is never closed extends to the end; one that was never opened is text.
    """
    if syntax == "plain":
        return [Piece(text)]
    if syntax not in _SYNTAXES:
        raise EngineError(f"prompt syntax is {syntax!r}; expected one of {', '.join(PROMPT_SYNTAXES)}")
    rules = _SYNTAXES[syntax]
    weighted = _merged(_scan(text, rules))
    return _split_at_breaks(weighted) if rules.breaks else weighted


@dataclass(slots=True)
class _Bracket:
    """An opened bracket; its factor may change when it is closed."""

    opening: str
    factor: float


def _scan(text: str, rules: _Syntax) -> list[Piece]:
    """Characters with their weights: first find each bracket's factor, then multiply along the nesting."""
    closing = {close: opening for opening, (close, _) in rules.brackets.items()}
    tokens: list[str | _Bracket | None] = []  # text, an opened bracket, or None where the innermost one is closed
    opened: list[_Bracket] = []
    position = 0
    while position < len(text):
        character = text[position]
        innermost = opened[-1].opening if opened else ""
        number = _NUMBER_THEN_CLOSE.match(text, position) if innermost and innermost == rules.weighted else None
        step = 1
        if character == "\\" and text[position + 1 : position + 2] in {*rules.brackets, *closing, "\\"}:
            tokens.append(text[position + 1])
            step = 2
        elif number is not None:
            opened.pop().factor = float(number[1])
            tokens.append(None)
            step = len(number[0])
        elif character in rules.brackets:
            opened.append(_Bracket(character, rules.brackets[character][1]))
            tokens.append(opened[-1])
        elif innermost and closing.get(character) == innermost:
            opened.pop()
            tokens.append(None)
        else:
            tokens.append(character)
        position += step
    return _weigh(tokens)


def _weigh(tokens: list[str | _Bracket | None]) -> list[Piece]:
    pieces: list[Piece] = []
    weights = [1.0]
    for token in tokens:
        if token is None:
            weights.pop()
        elif isinstance(token, _Bracket):
            weights.append(weights[-1] * token.factor)
        else:
            pieces.append(Piece(token, weights[-1]))
    return pieces


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one weight become one piece; there is at least one piece."""
    runs: list[tuple[list[str], float]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece.weight:
            runs[-1][0].append(piece.text)
        else:
            runs.append(([piece.text], piece.weight))
    return [Piece("".join(texts), weight) for texts, weight in runs] or [Piece("")]


def _split_at_breaks(pieces: list[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        first, *rest = _BREAK.split(piece.text)
        if first or not rest:
            result.append(Piece(first, piece.weight))
        result.extend(Piece(text, piece.weight, starts_chunk=True) for text in rest)
    return result


Chunk = list[tuple[int, float]]
"""One run of the text encoder: token ids with their weights, without start and end marks."""


def cut_into_chunks(pieces: Sequence[Piece], ids: Sequence[Sequence[int]], places: int) -> list[Chunk]:
    """Tokens of each piece -> chunks of up to `places` tokens; a piece after a BREAK starts a new one."""
    chunks: list[Chunk] = [[]]
    for piece, piece_ids in zip(pieces, ids, strict=True):
        if piece.starts_chunk:
            chunks.append([])
        for token in piece_ids:
            if len(chunks[-1]) == places:
                chunks.append([])
            chunks[-1].append((token, piece.weight))
    return chunks
