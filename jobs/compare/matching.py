"""Which rows of two datasets are the same request: joined as they stream by, in any order.

A row waits only until its partner comes. Two datasets in one order hold no more than a few batches of rows in memory;
a row that never meets its partner takes some 400 bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

REQUEST = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "sampler": "sampler",
    "eta": "eta",
    "model": "model",
    "loras": "loras",
    "image": "init_image_sha256",
    "strength": "strength",
    "mask": "mask_sha256",
}
"""What makes two rows one request: all parameters of a sample, each with the column that tells it.

A model counts by its name and not by its files, an image by its bytes and not by its name. A job's other settings, and
what a model is, may differ: they are what is compared.
"""

OUTCOME = ("row_id", "status", "pixel_sha256")
"""What else is read of a row to match it, and to see whether it changed."""
_REQUEST_BYTES, _ID_BYTES = 16, 8


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Rows by their place in their dataset, in order. `changed` (n, 2) are pairs: the one before, the one after."""

    identical: int
    changed: Numbers
    removed: Numbers
    added: Numbers


class _Row(NamedTuple):
    """`outcome` is what came of the request: its status, and the digest of its pixels."""

    number: int
    key: bytes
    outcome: str


def match(before: Iterator[pa.Table], after: Iterator[pa.Table], request: Sequence[str]) -> Matching:
    """Pair the rows of two datasets, which come in batches with the columns `OUTCOME` and those of `request`.

    A row's partner has the same values in the columns of `request`. Among several it is the one with the same row_id;
    those of one row_id, and what then remains, are paired in their order.
    """
    found = _Found()
    sides = (_Waiting(), _Waiting())
    readers = [_rows(tables, request) for tables in (before, after)]
    for batches in zip_longest(*readers, fillvalue=()):
        for side, batch in enumerate(batches):
            for row in batch:
                partner = sides[1 - side].take(row.key)
                if partner is None:
                    sides[side].add(row)
                else:
                    found.add(*((partner, row) if side else (row, partner)))
    return found.rest(*(side.left() for side in sides))


def _rows(tables: Iterator[pa.Table], names: Sequence[str]) -> Iterator[list[_Row]]:
    """The rows, a batch at a time. A key is a digest of the request, then one of the row_id."""
    number = 0
    for table in tables:
        requests = zip(*(table.column(name).to_pylist() for name in names), strict=True)
        others = zip(*(table.column(name).to_pylist() for name in OUTCOME), strict=True)
        batch = []
        for request, (row_id, status, pixels) in zip(requests, others, strict=True):
            key = _digest(request, _REQUEST_BYTES) + _digest(row_id, _ID_BYTES)
            batch.append(_Row(number, key, f"{status} {pixels}"))
            number += 1
        yield batch


def _digest(value: object, size: int) -> bytes:
    return hashlib.blake2b(repr(value).encode(), digest_size=size).digest()


class _Waiting:
    """Rows of one dataset whose partner has not come yet."""

    def __init__(self) -> None:
        self._rows: dict[bytes, list[_Row]] = {}

    def add(self, row: _Row) -> None:
        self._rows.setdefault(row.key, []).append(row)

    def take(self, key: bytes) -> _Row | None:
        """The first one with that key, which waits no longer."""
        rows = self._rows.get(key)
        if rows is None:
            return None
        row = rows.pop(0)
        if not rows:
            del self._rows[key]
        return row

    def left(self) -> list[_Row]:
        """All that still wait, in order."""
        return sorted(row for rows in self._rows.values() for row in rows)


@dataclass(kw_only=True)
class _Found:
    identical: int = 0
    changed: array[int] = field(default_factory=lambda: array("q"))

    def add(self, before: _Row, after: _Row) -> None:
        if before.outcome == after.outcome:
            self.identical += 1
        else:
            self.changed.extend((before.number, after.number))

    def rest(self, before: list[_Row], after: list[_Row]) -> Matching:
        """The rows that are left are paired by their request alone."""
        waiting: dict[bytes, list[_Row]] = {}
        for row in reversed(before):
            waiting.setdefault(row.key[:_REQUEST_BYTES], []).append(row)
        added = array("q")
        for row in after:
            same = waiting.get(row.key[:_REQUEST_BYTES])
            if same:
                self.add(same.pop(), row)
            else:
                added.append(row.number)
        removed = sorted(row.number for rows in waiting.values() for row in rows)
        pairs = np.array(self.changed, dtype=np.int64).reshape(-1, 2)
        return Matching(
            identical=self.identical,
            changed=pairs[np.argsort(pairs[:, 0])],
            removed=np.array(removed, dtype=np.int64),
            added=np.array(added, dtype=np.int64),
        )
