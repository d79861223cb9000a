"""Emphasis syntaxes: nesting, escapes, unbalanced brackets, and prompts of the wild as they stand."""

from __future__ import annotations

import pytest

from latentmill.engine import EngineError
from latentmill.engine.text.prompts import Piece, parse_prompt


def weights(text: str, syntax: str) -> list[tuple[str, float]]:
    return [(piece.text, pytest.approx(piece.weight)) for piece in parse_prompt(text, syntax)]


@pytest.mark.parametrize("text", ["a (b) [c] {d} \\( BREAK e", "", "(x:1.3)", "{{alice}}, {{{solo}}}"])
def test_plain_takes_every_character_as_it_stands(text):
    assert parse_prompt(text, "plain") == [Piece(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1)]),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("(red:1.3) cat", [("red", 1.3), (" cat", 1)]),
        ("(red : .5 )", [("red ", 0.5)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("((a))", [("a", 1.21)]),
        ("([a])", [("a", 1)]),
        (r"a \(red\) cat", [("a (red) cat", 1)]),
        (r"back\slash \\ [x]", [("back\\slash \\ ", 1), ("x", 1 / 1.1)]),
        ("ratio 16:9 (wide)", [("ratio 16:9 ", 1), ("wide", 1.1)]),
        ("(ratio 16:9)", [("ratio 16", 9)]),
        ("[x:1.5]", [("x:1.5", 1 / 1.1)]),
        ("(open", [("open", 1.1)]),
        ("a ((b", [("a ", 1), ("b", 1.21)]),
        ("closed) too]", [("closed) too]", 1)]),
        ("(mixed]", [("mixed]", 1.1)]),
        ("{curly} is text", [("{curly} is text", 1)]),
    ],
)
def test_a1111(text, expected):
    assert weights(text, "a1111") == [(piece, pytest.approx(weight)) for piece, weight in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a}", [("a", 1.05)]),
        ("{{a}} b", [("a", 1.05**2), (" b", 1)]),
        ("[a]", [("a", 1 / 1.05)]),
        ("{{{a}, b}", [("a", 1.05**3), (", b", 1.05**2)]),
        ("(round) stays", [("(round) stays", 1)]),
        ("a BREAK b", [("a BREAK b", 1)]),
    ],
)
def test_novelai(text, expected):
    assert weights(text, "novelai") == [(piece, pytest.approx(weight)) for piece, weight in expected]


def test_break_starts_a_chunk_also_inside_brackets_but_not_inside_a_word():
    assert parse_prompt("a BREAK b BREAKFAST", "a1111") == [Piece("a"), Piece("b BREAKFAST", 1.0, starts_chunk=True)]
    inside = parse_prompt("(a BREAK b:2)", "a1111")
    assert inside == [Piece("a", 2.0), Piece("b", 2.0, starts_chunk=True)]


def test_the_articles_prompt_is_read_as_it_stands():
    pieces = parse_prompt("{{alice}}, alice in wonderland, {{{solo}}},1girl,{{delicate face}},10s,", "novelai")
    assert [(piece.text, round(piece.weight, 6)) for piece in pieces] == [
        ("alice", 1.1025),
        (", alice in wonderland, ", 1.0),
        ("solo", 1.157625),
        (",1girl,", 1.0),
        ("delicate face", 1.1025),
        (",10s,", 1.0),
    ]


def test_very_deep_nesting_is_read_in_one_pass():
    pieces = parse_prompt("[x" * 20_000 + "]" * 20_000 + "y", "a1111")
    assert pieces[-1] == Piece("y")
    assert pieces[0] == Piece("x", 1 / 1.1)


def test_an_unknown_syntax_is_refused():
    with pytest.raises(EngineError, match="'compel'; expected one of plain, a1111, novelai"):
        parse_prompt("x", "compel")
