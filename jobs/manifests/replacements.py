"""Search and replace in prompts as a sweep axis: `prompt.s/red/{blue,green}/`, what web UIs call Prompt S/R.

The axis's name is the part up to the replacement, `prompt.s/red/`; its values take the place of the text. All axes of
one field replace at once, so that no replacement is searched again, and the length of what comes of it is known
without making it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import MAX_TEXT_BYTES, shorten, text_fault

FIELDS_WITH_TEXT = ("prompt", "negative_prompt")
MAX_SEARCH_BYTES = 200

_START = re.compile(r"(prompt|negative[_-]prompt)\.s(?=.)", re.DOTALL)


def parse_replacement(text: str) -> tuple[str, str] | None:
    """A flag such as `prompt.s/red/{blue,green}/` or `prompt.s/red/=blue,green`, or None if it is another axis.

    Returned are the axis's name and its values as they are written: `{...}`, `=...` or one value.
    """
    found = _START.match(text)
    if found is None:
        return None
    search, rest = _until(text[found.end() + 1 :], text[found.end()])
    if rest is None:
        raise UsageError(_malformed(text))
    return replacement_name(found[1], search), rest


def replacement_values(flag: str, rest: str) -> list[str]:
    """The values in what follows an axis's name in a flag: `{blue,green}/` or `blue/`."""
    delimiter = flag[flag.index(".s") + 2]
    value, after = _until(rest, delimiter, unescape=False)
    if after or value.startswith("{") != value.endswith("}"):
        raise UsageError(_malformed(flag))
    if value.startswith("{") and value.endswith("}"):
        return _split(value[1:-1])
    return [_unescape(value)]


def replacement_name(field: str, search: str) -> str:
    """The axis's name, in the one spelling that plans have."""
    escaped = search.replace("\\", "\\\\").replace("/", "\\/")
    return f"{field.replace('-', '_')}.s/{escaped}/"


def replaced_by(name: str) -> tuple[str, str] | None:
    """The field and the text that the axis of that name replaces; None if it is another axis."""
    found = _START.match(name)
    if found is None:
        return None
    search, rest = _until(name[found.end() + 1 :], name[found.end()])
    if rest != "":
        raise UsageError(_malformed(name))
    fault = text_fault(search)
    if not search or fault or len(search.encode()) > MAX_SEARCH_BYTES or not search.isprintable():
        raise UsageError(
            f"sweep axis {shorten(name)}: the text to be replaced must be 1 to {MAX_SEARCH_BYTES} printable bytes"
        )
    return found[1].replace("-", "_"), search


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """The texts of one field that axes replace, each with the axis's name and values. Without any, texts stay."""

    axes: Mapping[str, tuple[str, Sequence[str]]]

    def replace(self, text: str, chosen: Mapping[str, Any]) -> str:
        """The text with each searched text replaced by the value that its axis has in `chosen`, by name."""
        if not self.axes:
            return text
        return self._pattern.sub(lambda found: str(chosen[self.axes[found[0]][0]]), text)

    def longest(self, text: str) -> int:
        """Bytes of the longest text that can come of it."""
        return len(text.encode()) + sum(self._growth[found[0]] for found in self._matches(text))

    def missing(self, text: str) -> Iterator[str]:
        """The names of axes whose text is not in it: they change nothing."""
        found = {match[0] for match in self._matches(text)}
        return (name for search, (name, _) in self.axes.items() if search not in found)

    @property
    def worst_growth(self) -> float:
        """How many times as long a text can become that is not known yet."""
        return max((1 + self._growth[search] / len(search.encode()) for search in self.axes), default=1.0)

    def longest_choice(self) -> dict[str, str]:
        """Each axis's longest value, by its name."""
        return {name: max(values, key=lambda value: len(value.encode())) for name, values in self.axes.values()}

    def fault(self, name: str, text: str) -> str | None:
        """Why what comes of a text can be too long, or None."""
        longest = self.longest(text) if self.axes else 0
        if longest <= MAX_TEXT_BYTES:
            return None
        return f"{name} can have {longest:,} bytes once texts in it are replaced, the limit is {MAX_TEXT_BYTES:,}"

    def _matches(self, text: str) -> Iterator[re.Match[str]]:
        return self._pattern.finditer(text) if self.axes else iter(())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.axes)))

    @cached_property
    def _growth(self) -> dict[str, int]:
        return {
            search: max(0, max(len(value.encode()) for value in values) - len(search.encode()))
            for search, (_, values) in self.axes.items()
        }


def replacements_of(field: str, axes: Mapping[str, Sequence[Any]]) -> Replacements:
    """Those of the axes, given by name, that replace texts of the field."""
    found: dict[str, tuple[str, Sequence[str]]] = {}
    for name, values in axes.items():
        replaced = replaced_by(name)
        if replaced is not None and replaced[0] == field:
            found[replaced[1]] = (name, list(map(str, values)))
    return Replacements(axes=found)


def _until(text: str, delimiter: str, *, unescape: bool = True) -> tuple[str, str | None]:
    """What comes before the first delimiter that has no backslash, and what after it; None without one."""
    index = 0
    while index < len(text) and text[index] != delimiter:
        index += 2 if text[index] == "\\" else 1
    before = text[:index]
    after = text[index + 1 :] if index < len(text) else None
    return (_unescape(before) if unescape else before), after


def _split(text: str) -> list[str]:
    parts, rest = [], text
    while True:
        part, after = _until(rest, ",")
        parts.append(part)
        if after is None:
            return parts
        rest = after


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _malformed(text: str) -> str:
    return (
        f"--sweep {shorten(text)} is not a search and replace; write for example prompt.s/red/{{blue,green}}/, "
        "with a backslash before a / or a comma that is part of a text"
    )
