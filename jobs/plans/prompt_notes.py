"""What should be said of a job's prompts: other programs' syntax that is read as words, searched texts that lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.jobs.manifests.fields import shorten
from latentmill.jobs.manifests.prompt_texts import PromptTexts

_LIKE_A_TEMPLATE = r"\{[^{}]*\||\d\$\$|__[A-Za-z][^\s{}|]*__"
_LIKE_A_NETWORK = r"(?i)<(?:lyco|hypernet):"
"""What `<lora:...>` means is said by row_loras.py, which knows the job's LoRAs."""


class PromptNotes:
    """Counts, as prompts are read. With templates, texts are not looked at: what they become is not known yet."""

    def __init__(self, texts: PromptTexts) -> None:
        self._texts = texts
        self._rows = 0
        self._found: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._missing: Counter[str] = Counter()

    def add(self, prompts: pa.Array) -> None:
        """Look at some of the prompts."""
        self._rows += len(prompts)
        patterns = {"networks": _LIKE_A_NETWORK}
        if self._texts.template == "none":
            patterns["templates"] = _LIKE_A_TEMPLATE
        for kind, pattern in patterns.items():
            matching = prompts.filter(pc.match_substring_regex(prompts, pattern))
            if len(matching):
                self._found[kind] += len(matching)
                self._first.setdefault(kind, matching[0].as_py())
        replaced = self._texts.replaced["prompt"]
        if replaced.axes and not self._texts.from_templates:
            for text in prompts.to_pylist():
                self._missing.update(replaced.missing(text))

    def notes(self) -> tuple[str, ...]:
        """One line each; texts in them are untrusted."""
        said = []
        remedies: Mapping[str, str] = {
            "templates": "look like templates and are drawn as they are; to expand them, say --template dynamic",
            "networks": "name a network, which is not loaded: the text is read as words",
        }
        for kind, remedy in remedies.items():
            if kind in self._found:
                said.append(f"{self._share(self._found[kind])} {remedy}; the first: {shorten(self._first[kind])}")
        for name, count in self._missing.items():
            said.append(
                f"{self._share(count)} lack the text that the axis {name} replaces: its values change nothing there"
            )
        return tuple(said)

    def _share(self, count: int) -> str:
        return f"{count:,} of {self._rows:,} prompts"


def prompts_of_axis(values: Sequence[object]) -> pa.Array:
    """The prompts of an axis, to be looked at."""
    return pa.array([str(value) for value in values], pa.string())
