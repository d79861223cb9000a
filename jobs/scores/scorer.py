"""What a scorer is: pictures and their prompts in, a few values for each out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError
from latentmill.jobs.manifests.fields import shorten, text_fault

COLUMN_TYPES = ("float32", "int64", "string")
"""The types that a scorer's columns can have, as Arrow names them."""

NAME = re.compile(r"[a-z][a-z0-9]{0,31}", re.ASCII)
COLUMN = re.compile(r"[a-z][a-z0-9]{0,31}(_[a-z0-9_]{1,60})?", re.ASCII)
MAX_COLUMNS = 64
_LONGEST_VERSION = 200
_GREATEST = float(np.finfo(np.float32).max)

Value = float | int | str | None


class Scorer(Protocol):
    """Judges pictures. The same pictures and prompts, in the same batch, always give the same values.

    Whatever can change a value changes `version`. `columns` maps each column to its type; a column is the scorer's
    name, or begins with it and an underscore, so that no two scorers share one. A class may have a method
    `load(spec)`, which makes a scorer from the settings of `latentmill score`; without it, it is called without
    arguments. It may have a text `hash_column`: that column holds 64-bit hashes, as 16 hexadecimal digits, by which
    pictures that look alike are found, and a true `on_device` where it runs on a GPU, if there is one.
    """

    name: str
    version: str
    columns: Mapping[str, str]

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Mapping[str, Sequence[Value]]:
        """A list for each column, of one value a picture; None where there is none. Pictures are (h, w, 3) RGB."""
        ...


def check_identity(name: str, version: object, columns: object) -> None:
    """Raises ValueError unless a scorer may be called that, and have those columns."""
    if not NAME.fullmatch(name):
        raise ValueError(f"the name {shorten(name)} is not of small letters and digits, 32 at most")
    if not isinstance(version, str) or not 0 < len(version) <= _LONGEST_VERSION or text_fault(version):
        raise ValueError(f"its version is {shorten(version)}, expected a text of 1 to {_LONGEST_VERSION} characters")
    if not isinstance(columns, Mapping) or not 0 < len(columns) <= MAX_COLUMNS:
        raise ValueError(f"its columns are {shorten(columns)}, expected 1 to {MAX_COLUMNS} names with their types")
    for column, kind in columns.items():
        if not isinstance(column, str) or not COLUMN.fullmatch(column) or column.partition("_")[0] != name:
            raise ValueError(f"its column {shorten(column)} is neither {name} nor begins with {name}_")
        if kind not in COLUMN_TYPES:
            raise ValueError(f"its column {column} is {shorten(kind)}; there is {', '.join(COLUMN_TYPES)}")


def score_batch(scorer: Scorer, pictures: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, list[Value]]:
    """The values of a batch, checked. Raises JobError if the scorer gave anything else than it declares."""
    given = scorer.score(pictures, prompts)
    if set(given) != set(scorer.columns) or any(len(values) != len(pictures) for values in given.values()):
        shapes = ", ".join(f"{len(values)} of {name}" for name, values in given.items())
        raise JobError(
            f"the scorer {scorer.name} gave {shapes or 'nothing'} for {len(pictures)} pictures, and declares "
            f"{', '.join(scorer.columns)}; correct it"
        )
    found = {}
    for name, kind in scorer.columns.items():
        values = [_plain(value) for value in given[name]]
        wrong = next((value for value in values if value is not None and not _fits(value, kind)), None)
        if wrong is not None:
            raise JobError(f"the scorer {scorer.name} gave {shorten(wrong)} as {name}, which is {kind}; correct it")
        found[name] = values
    return found


def _plain(value: Any) -> Value:
    """Numbers of NumPy and torch as Python's own."""
    plain: Value = value.item() if hasattr(value, "item") else value
    return plain


def _fits(value: object, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str) and not text_fault(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) and abs(value) < 1 << 63 if kind == "int64" else abs(value) <= _GREATEST
