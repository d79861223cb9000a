"""Wildcards of templates: text files of one folder whose lines stand for `__name__`."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Protocol

from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.manifests.fields import nearest
from latentmill.jobs.manifests.template_tree import Choice, Node, draw_template
from latentmill.jobs.manifests.templates import TemplateError, TooDeepError, choice_of_lines, parse_template
from latentmill.jobs.store.inputs import reading
from latentmill.jobs.store.urls import allowed_filesystem, display_url

MAX_FILES = 10_000
MAX_BYTES = 32 << 20
"""The most bytes of all wildcards that a job uses."""

_REMEMBERED = 4096
_COMMENT = "#"


class Lines(Protocol):
    """Where a wildcard's lines come from: a folder, or a plan."""

    def lines(self, name: str) -> tuple[str, ...]:
        """The lines of the wildcard. Raises TemplateError if there is none of that name."""
        ...


class WildcardFolder:
    """The wildcards in a folder, or none. `used` holds the lines of those that were asked for."""

    def __init__(self, place: str | None) -> None:
        self.used: dict[str, tuple[str, ...]] = {}
        self._place = place
        self._files: dict[str, str] | None = None
        self._bytes = 0

    def lines(self, name: str) -> tuple[str, ...]:
        """The lines of `NAME.txt`, or of all files that a pattern such as `colours*` matches."""
        if name not in self.used:
            self.used[name] = self._read(name)
        return self.used[name]

    def _read(self, name: str) -> tuple[str, ...]:
        if self._place is None:
            raise TemplateError(f"__{name}__ in the template is a wildcard, but no folder has them: give --wildcards")
        files = self._listed()
        pattern = re.compile(re.escape(name).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
        matching = [found for found in files if pattern.fullmatch(found)]
        if not matching:
            raise TemplateError(
                f"__{name}__ in the template: {display_url(self._place)} has no {name}.txt{nearest(name, files)}"
            )
        lines = tuple(line for found in matching for line in self._file(files[found]))
        if not lines:
            raise UsageError(f"wildcard {name} of {display_url(self._place)} has no lines; put at least one there")
        return lines

    def _listed(self) -> dict[str, str]:
        """The files' paths by their names without `.txt`, sorted."""
        if self._files is None:
            fs, folder = allowed_filesystem(str(self._place))
            shown, no_folder = f"wildcards {display_url(str(self._place))}", "is no folder; name one with .txt files"
            with reading(shown, no_folder):
                if fs.info(folder)["type"] != "directory":
                    raise UsageError(f"{shown} {no_folder}")
                paths = sorted(path for path in fs.find(folder) if path.endswith(".txt"))
            if len(paths) > MAX_FILES:
                raise UsageError(f"{shown} has {len(paths):,} files, the limit is {MAX_FILES:,}")
            base = PurePosixPath(folder)
            self._files = {str(PurePosixPath(path).relative_to(base).with_suffix("")): path for path in paths}
        return self._files

    def _file(self, path: str) -> list[str]:
        fs, _ = allowed_filesystem(str(self._place))
        with reading(f"wildcard {path}"):
            self._bytes += fs.size(path)
            if self._bytes > MAX_BYTES:
                raise UsageError(
                    f"the wildcards of this job have more than {MAX_BYTES:,} bytes; use fewer or shorter ones"
                )
            data = fs.cat_file(path)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UsageError(f"wildcard {path} is not UTF-8 text; save it as UTF-8") from None
        lines = [line.strip() for line in text.split("\n")]
        return [line for line in lines if line and not line.startswith(_COMMENT)]


class PlannedWildcards:
    """The wildcards that a plan keeps, read when one is asked for."""

    def __init__(self, read: Callable[[], bytes], digest: str | None) -> None:
        self._read = read
        self._digest = digest

    def lines(self, name: str) -> tuple[str, ...]:
        """As they were planned. Raises JobError if they are not that."""
        return self._kept[name]

    @cached_property
    def _kept(self) -> dict[str, tuple[str, ...]]:
        data = self._read()
        if wildcards_digest(data) != self._digest:
            raise JobError("the plan's wildcards are not what was planned; restore _job/ or start anew")
        return {name: tuple(lines) for name, lines in json.loads(data).items()}


def encode_wildcards(used: Mapping[str, tuple[str, ...]]) -> bytes:
    """The wildcards as a plan keeps them, the same bytes for the same lines."""
    return json.dumps({name: list(used[name]) for name in sorted(used)}, ensure_ascii=True).encode()


def wildcards_digest(data: bytes) -> str:
    """What a plan says of its wildcards."""
    return hashlib.sha256(data).hexdigest()


class Templates:
    """Templates with their wildcards, parsed once each while they are remembered; safe to share between threads."""

    def __init__(self, wildcards: Lines) -> None:
        self._wildcards = wildcards
        self._parsed: dict[str, Choice] = {}
        self._open: list[str] = []
        self._lock = threading.Lock()  # what another thread is parsing just now would look like a circle
        self.parse = lru_cache(_REMEMBERED)(self._parse)

    def draw(self, text: str, seed: int) -> str:
        """One of the template's texts, by a seed."""
        return draw_template(self.parse(text), text, seed)

    def text(self, text: str, number: int) -> str:
        """The template's text with that number."""
        return self.parse(text).text(number)

    def _parse(self, text: str) -> Node:
        with self._lock:
            return parse_template(text, self._wildcard)

    def _wildcard(self, name: str, depth: int) -> Choice:
        if name in self._parsed:
            return self._parsed[name]
        if name in self._open:
            chain = " -> ".join([*self._open[self._open.index(name) :], name])
            raise UsageError(f"wildcards use each other in a circle: {chain}; break it")
        lines = self._wildcards.lines(name)
        self._open.append(name)
        try:
            self._parsed[name] = choice_of_lines(lines, self._wildcard, depth)
        except TooDeepError:
            raise
        except TemplateError as error:  # not the row's fault, and no row would go well
            raise UsageError(f"wildcard {name}: {error}") from None
        finally:
            self._open.pop()
        return self._parsed[name]
