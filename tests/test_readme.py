"""What the README says of files, flags and verbs is so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import typer

from latentmill import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked(*patterns: str) -> list[str]:
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.split()


def test_the_architecture_lists_every_module_once():
    tree = TEXT.split("## Architecture")[1].split("```")[1]
    listed, top = [], ""
    for line in tree.splitlines():
        name = line.split()[0] if line.split() else ""
        if line.endswith("/") and not line.startswith(" "):
            top = line
        elif line.startswith("  ") and name.endswith(".py"):
            listed.append(top + name)
    modules = [
        path for path in tracked("engine/**.py", "jobs/**.py", "training/**.py") if not path.endswith("__init__.py")
    ]
    assert sorted(listed) == sorted(modules)


def test_every_linked_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_verb_and_flag_of_the_examples_exists():
    command = typer.main.get_command(cli.app)
    used = re.findall(r"^latentmill (\S+)((?: .*)?)$", TEXT, re.MULTILINE)
    assert len(used) >= 8
    for verb, rest in used:
        assert verb in command.commands, verb
        if verb == "txt2img":
            continue
        known = {name for parameter in command.commands[verb].params for name in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z0-9-]+", rest.split("#")[0])) <= known, rest


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {name for names in re.findall(r"`?make ((?:[a-z-]+ ?)+)`", TEXT) for name in names.split()}
    assert {"run", "test", "lint"} <= named | {"run", "test"}
    assert named <= targets
