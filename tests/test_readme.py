"""What the README and docs/ say of files, flags, verbs and modules is so."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from latentmill import cli
from latentmill.jobs.txt2img.options import build_parser

ROOT = Path(__file__).parents[1]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in GENERATE["PAGES"]}
README_BYTES = 14_000
COMMAND = typer.main.get_command(cli.app)

every_page = pytest.mark.parametrize("page", PAGES)


def tracked(*patterns: str) -> list[str]:
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.split()


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command line in the page's examples, without remarks."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s#.*", "", line).split()


def flags_of(words: list[str]) -> tuple[set[str], int]:
    """The flags that the verb of a `latentmill ...` line takes, and how many of the words name it."""
    command, depth = COMMAND, 1
    while hasattr(command, "commands"):
        assert words[depth] in command.commands, " ".join(words)
        command, depth = command.commands[words[depth]], depth + 1
    if command.name == "txt2img":
        return set(build_parser("latentmill txt2img")._option_string_actions), depth
    return {name for parameter in command.params for name in parameter.opts}, depth


def anchors(text: str) -> set[str]:
    """What a link may name after its #: the headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_fits_on_a_few_screens():
    assert len(PAGES["README.md"].encode()) <= README_BYTES


@every_page
def test_the_generated_parts_are_those_of_the_code(page: str):
    assert PAGES[page] == GENERATE["regenerated"](PAGES[page]), "run `make docs`"


def test_every_generated_part_has_a_place():
    placed = [name for text in PAGES.values() for name in re.findall(r"<!-- generated: (\w+) -->", text)]
    assert sorted(placed) == sorted(GENERATE["PARTS"])


def test_the_architecture_lists_every_module_once():
    listed, top = [], ""
    for line in PAGES["docs/architecture.md"].split("generated: modules")[1].splitlines():
        name = line.split()[0] if line.split() else ""
        if name.endswith("/") and not line.startswith(" "):
            top = "" if name == "latentmill/" else name
        elif line.startswith("  ") and name.endswith(".py"):
            listed.append(top + name)
            assert line.split()[1:], f"{top}{name} has no docstring"
    modules = [path for path in tracked("*.py") if not path.startswith("tests/") and not path.endswith("__init__.py")]
    assert sorted(listed) == sorted(modules)


@every_page
def test_every_linked_file_and_heading_is_there(page: str):
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = here / place if place else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_can_be_found_from_the_readme():
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in PAGES["README.md"]] == []


def test_every_verb_and_flag_of_the_examples_exists():
    used = 0
    for text in PAGES.values():
        for words in commands(text):
            if words[:1] == ["latentmill"]:
                known, depth = flags_of(words)
                given = {word.partition("=")[0] for word in words[depth:] if word.startswith("--")}
                assert given <= known, " ".join(words)
                used += 1
    assert used >= 20


@every_page
def test_every_verb_and_flag_that_the_text_names_exists(page: str):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    verbs = COMMAND.commands
    theirs = {"--steps"}  # another program's, as an example of what is refused
    ours = {"--help", "--version"}.union(*(flags_of(["latentmill", verb])[0] for verb in verbs))
    for quoted in re.findall(r"`([^`]+)`", prose):
        words = quoted.split()
        if words[0] == "latentmill" and len(words) > 1:
            assert words[1] in verbs, quoted
        elif words[0].startswith("--"):
            assert re.split(r"[ =]", quoted)[0] in ours | theirs, quoted


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for text in PAGES.values():
        lines = [" ".join(words) for words in commands(text)] + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            if line.startswith("make "):
                named |= {word for word in line.split()[1:] if "=" not in word}
    assert {"run", "test", "docs"} <= named
    assert named <= targets


def test_every_module_that_is_run_by_name_exists():
    named = {name for text in PAGES.values() for name in re.findall(r"python -m ([\w.]+)", text)}
    assert named >= {"tests.soak", "tests.crash_points"}
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


@every_page
def test_every_file_that_is_named_exists(page: str):
    """Places in the repository, by their first folder; NAME stands for one of the reader's own."""
    named = re.findall(r"`((?:engine|jobs|configs|tests|training|bench|docs)/[\w./-]*)`", PAGES[page])
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []
