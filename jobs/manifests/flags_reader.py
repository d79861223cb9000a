"""Text manifests whose lines hold prompts with flags, as the scripts of two web UIs take them.

`--prompt "a cat" --seed 3 --sampler_name "Euler a"`: every value after its flag, quoted as in a shell.
`a cat --n blurry --d 3 --s 20`: the prompt first, then one-letter flags.
Nothing in a line is executed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from latentmill.jobs.manifests.fields import nearest, shorten
from latentmill.jobs.manifests.parameters import find_sampler, unknown_sampler
from latentmill.jobs.manifests.readers import (
    TOO_LONG,
    Layout,
    ManifestFile,
    ParsedRow,
    Reader,
    RowBatch,
    parsed_batch,
    read_lines,
)

COLUMNS = (
    "prompt",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "guidance_scale",
    "num_inference_steps",
    "sampler",
    "num_images",
)
"""The columns that a line can give."""

_LONG = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "sampler_name": "sampler",
    "n_iter": "num_images",
}
_SHORT = {
    "n": "negative_prompt",
    "d": "seed",
    "s": "num_inference_steps",
    "l": "guidance_scale",
    "w": "width",
    "h": "height",
}
_INLINE_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


class FlagsReader(Reader):
    """Rows are numbered by line: blank lines count, but are not rows."""

    def scan(self, file: ManifestFile) -> Layout:  # noqa: ARG002 - the columns are always the same
        """The columns that a line can give."""
        return Layout(own=COLUMNS, carried=())

    def read(self, file: ManifestFile, layout: Layout) -> Iterator[RowBatch]:
        """A row for each line with text."""
        number = 0
        with file.open() as stream:
            for lines in read_lines(stream):
                rows: list[tuple[int, ParsedRow]] = []
                for line in lines:
                    number += 1
                    if line is None:
                        rows.append((number, ({}, TOO_LONG)))
                    elif line.strip():
                        rows.append((number, read_flags(line.removesuffix("\r"))))
                yield parsed_batch(rows, layout)

    def looks_like(self, start: bytes) -> bool:
        """One of the first lines begins with `--prompt`."""
        lines = start.decode("utf-8", "replace").split("\n")
        return any(line.startswith(("--prompt ", "--prompt=")) for line in lines)


def read_flags(line: str) -> tuple[dict[str, Any], str | None]:
    """A line's columns, and why they cannot be used, or None. A line without flags is a prompt."""
    long = line.lstrip().startswith("--")
    try:
        given = _long_flags(line) if long else _inline_flags(line)
    except ValueError as error:
        return {"prompt": line}, str(error)
    known = _LONG if long else _SHORT
    row: dict[str, Any] = {}
    for flag, value in given:
        if flag not in known and flag:
            return {"prompt": line}, _unknown(flag, known)
        column = known[flag] if flag else "prompt"
        if column in row:
            return {"prompt": line}, f"--{flag} is given twice; leave one out"
        row[column] = value
    if row.get("seed") == "-1":  # any seed: the job's default
        del row["seed"]
    if "sampler" in row:
        name = row["sampler"]
        row["sampler"] = find_sampler(name)
        if row["sampler"] is None:
            return row, unknown_sampler(name)
    return row, None


def _long_flags(line: str) -> list[tuple[str, str]]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"the line is not quoted as in a shell ({error}); close the quotes") from None
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            given.append((flag, [value] if equals else []))
        else:
            given[-1][1].append(word)
    empty = next((flag for flag, values in given if not values), None)
    if empty is not None:
        raise ValueError(f"--{empty} has no value; write one after it")
    return [(flag, " ".join(values)) for flag, values in given]


def _inline_flags(line: str) -> list[tuple[str, str]]:
    """The prompt under no name, then the flags. Everything up to the next flag is a flag's value."""
    prompt, *rest = _INLINE_FLAG.split(line)
    given = [("", prompt.strip() if rest else prompt)]
    for text in rest:
        flag, _, value = text.partition(" ")
        given.append((flag, value.strip()))
    return given


def _unknown(flag: str, known: Mapping[str, str]) -> str:
    return (
        f"--{shorten(flag)[1:-1]} is unknown{nearest(flag, known)}; known: {', '.join(f'--{name}' for name in known)}"
    )


FLAGS = FlagsReader()
