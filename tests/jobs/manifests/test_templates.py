"""Templates of prompts: what they stand for, by number and by seed, and hostile ones."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.template_tree import COUNT_LIMIT
from latentmill.jobs.manifests.templates import TemplateError
from latentmill.jobs.manifests.wildcards import Templates, WildcardFolder, encode_wildcards


@pytest.fixture
def templates(tmp_path):
    (tmp_path / "colour.txt").write_text("\ufeffred\n# a comment\n\n3::blue\n  {dark|light} green \r\n", "utf-8")
    (tmp_path / "body").mkdir()
    (tmp_path / "body" / "hair_style.txt").write_text("__colour__ hair\nbald\n")
    (tmp_path / "body" / "none.txt").write_text("# nothing\n")
    (tmp_path / "bad.txt").write_text("{a|b\n")
    (tmp_path / "ring.txt").write_text("__circle__\n")
    (tmp_path / "circle.txt").write_text("a __ring__\n")
    return Templates(WildcardFolder(str(tmp_path)))


def all_texts(templates, text):
    node = templates.parse(text)
    return [node.text(number) for number in range(node.count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("a plain | text", ["a plain | text"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("a {red|} hat", ["a red hat", "a  hat"]),
        ("{{a|b}|c}", ["a", "b", "c"]),
        ("{2::a|0.5::b}", ["a", "b"]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, a", "b, c", "c, a", "c, b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{-2$$a|b}", ["a", "b", "a, b", "b, a"]),
        ("{2-$$a|b}", ["a, b", "b, a"]),
        ("{0-1$$a}", ["", "a"]),
        ("{9$$a|b}", ["a, b", "b, a"]),
        ("{2$${a|b}|c}", ["a, c", "b, c", "c, a", "c, b"]),
        (r"\{a\|b\} (x:1.2) \(y\) \__z__ f__", [r"{a|b} (x:1.2) \(y\) __z__ f__"]),
        ("__colour__", ["red", "blue", "dark green", "light green"]),
        ("__body/hair_style__", ["red hair", "blue hair", "dark green hair", "light green hair", "bald"]),
        ("__col*__", ["red", "blue", "dark green", "light green"]),
        ("__**style__", ["red hair", "blue hair", "dark green hair", "light green hair", "bald"]),
    ],
)
def test_a_template_stands_for_these_texts_in_this_order(templates, text, expected):
    assert all_texts(templates, text) == expected
    node = templates.parse(text)
    assert node.longest == max(len(made.encode()) for made in expected) == len(node.longest_text().encode())
    assert {templates.draw(text, seed) for seed in range(300)} == set(expected)


def test_several_lines_of_one_wildcard_are_never_the_same_line(templates):
    assert len(all_texts(templates, "{2$$__colour__}")) == 10
    for seed in range(50):
        first, second = templates.draw("{2$$__colour__}", seed).split(", ")
        assert first.split()[-1] != second.split()[-1]


def test_weights_say_how_often_an_option_is_drawn(templates):
    drawn = Counter(templates.draw("{3::a|b|0::c}", seed) for seed in range(4000))
    assert 2800 < drawn["a"] < 3200
    assert drawn["c"] == 0
    assert 0.45 < sum(templates.draw("__colour__", seed) == "blue" for seed in range(2000)) / 2000 < 0.75


def test_a_seed_draws_the_same_text_in_any_process_and_other_seeds_others(templates):
    assert [templates.draw("{a|b|c|d} {2$$e|f|g}", seed) for seed in range(4)] == [
        "a e, g",
        "b e, g",
        "b f, g",
        "a e, g",
    ]
    program = (
        "from latentmill.jobs.manifests.wildcards import *; t = Templates(WildcardFolder(None));"
        "print([t.draw('{a|b|c|d} {2$$e|f|g}', seed) for seed in range(4)])"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([templates.draw("{a|b|c|d} {2$$e|f|g}", seed) for seed in range(4)])


@pytest.mark.parametrize("seed", range(30))
def test_numbers_reach_every_text_once_whatever_the_template(templates, seed):
    rng = random.Random(seed)
    letters = iter("abcdefghijklmnopqrstuvwxyz" * 4)

    def make(depth):
        if depth == 0 or rng.random() < 0.3:
            return next(letters)
        options = [make(depth - 1) for _ in range(rng.randint(1, 3))]
        low = rng.randint(1, len(options))
        return f"{{{low}-{rng.randint(low, len(options))}$$+$${'|'.join(options)}}}{next(letters)}"

    text = make(3)
    made = all_texts(templates, text)
    assert len(set(made)) == len(made)
    assert {templates.draw(text, number) for number in range(100)} <= set(made)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a {b|c", "character 3 of the template is never closed"),
        ("a } b", "character 3 that none opens"),
        ("{a|{b}", "character 1 of the template is never closed"),
        ("__colours__", "no colours.txt, did you mean 'colour'"),
        ("${x=!{a|b}}", "variables"),
        ("{3-2$$a|b|c}", "the wrong way round"),
        ("{0::a|0::b}", "weight 0"),
        ("{" * 10_000, "nested deeper than 100"),
        ("{" * 5_000 + "a" + "}" * 5_000, "nested deeper than 100"),
        ("{a|" * 5_000 + "}" * 5_000, "nested deeper than 100"),
    ],
)
def test_what_is_no_template_is_said_in_one_line(templates, text, words):
    with pytest.raises(TemplateError) as caught:
        templates.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "{a|b}" * 3_000,
        "{100$$" + "|".join("ab" * 4_000) + "}",
        "{1-$$" + "|".join(["{a|b}"] * 2_000) + "}",
        "__" * 8_000,
        "__a" * 5_000 + "\\{",
        "{" + "|" * 16_000 + "}",
        "_a" * 8_000,
    ],
)
def test_templates_of_any_size_are_counted_and_drawn_in_no_time(templates, text):
    began = time.process_time()
    try:
        node = templates.parse(text)
    except TemplateError:
        return
    assert 1 <= node.count <= COUNT_LIMIT
    node.draw(random.Random(0))
    assert time.process_time() - began < 2


def test_wildcards_that_multiply_are_counted_without_making_their_texts(tmp_path):
    for level in range(60):
        (tmp_path / f"w{level}.txt").write_text(f"__w{level + 1}____w{level + 1}__\n")
    (tmp_path / "w60.txt").write_text("a\nb\n")
    templates = Templates(WildcardFolder(str(tmp_path)))
    node = templates.parse("__w0__")
    assert (node.count, node.longest) == (COUNT_LIMIT, 2**60)


def test_wildcards_nested_too_deep_cost_their_row_alone(tmp_path):
    for level in range(200):
        (tmp_path / f"w{level}.txt").write_text(f"{{__w{level + 1}__|x}}\n")
    (tmp_path / "w200.txt").write_text("a\n")
    templates = Templates(WildcardFolder(str(tmp_path)))
    for _ in range(2):
        with pytest.raises(TemplateError, match="nested deeper than 100"):
            templates.parse("__w0__")
    assert templates.parse("__w190__").count == 11
    with pytest.raises(TemplateError, match="nested deeper than 100"):
        templates.parse("{" * 90 + "__w190__" + "}" * 90)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("__bad__", "wildcard bad: the brace at character 1"),
        ("__ring__", "circle: ring -> circle -> ring"),
        ("__body/none__", "no lines"),
    ],
)
def test_a_broken_wildcard_file_stops_the_job(templates, text, words):
    with pytest.raises(UsageError, match=words):
        templates.parse(text)


def test_threads_that_need_one_wildcard_at_the_same_time_wait_for_each_other(tmp_path):
    (tmp_path / "colour.txt").write_text("".join(f"{{a|b}} {{c|d|e}} {number}\n" for number in range(2000)))
    templates = Templates(WildcardFolder(str(tmp_path)))
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda seed: templates.draw(f"__colour__ {seed}", seed), range(8)))
    assert [text.rpartition(" ")[2] for text in drawn] == list("01234567")


def test_a_wildcard_never_leads_out_of_its_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("key\n")
    (tmp_path / "cards").mkdir()
    templates = Templates(WildcardFolder(str(tmp_path / "cards")))
    for text in ("__../secret__", f"__{tmp_path}/secret__", "__*/secret__", "__**secret__"):
        with pytest.raises(TemplateError, match="has no"):
            templates.parse(text)


def test_only_wildcards_in_use_are_kept(tmp_path, templates):
    templates.parse("__body/hair_style__")
    used = templates._wildcards.used
    assert list(json.loads(encode_wildcards(used))) == ["body/hair_style", "colour"]


def test_without_a_folder_a_wildcard_says_how_to_name_one():
    with pytest.raises(TemplateError, match="give --wildcards"):
        Templates(WildcardFolder(None)).parse("__a__")
    with pytest.raises(UsageError, match="is no folder"):
        Templates(WildcardFolder("/nowhere/at/all")).parse("__a__")
