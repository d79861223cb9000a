"""Pages that a browser opens from a folder or a bucket, without a server: our own files, and data beside them.

Browsers refuse to `fetch` files, but run scripts from them. So data lie in scripts of one call each, and everything
in them is text of one JSON literal: whatever a prompt says, it stays a value. The page's policy allows scripts of its
own folder and none inside the page, and pages/common.js writes values as text only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from latentmill.jobs import xmp
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.store.storage import Storage

MAX_TEXT = 1000
"""Characters of a text that `encode_columns` keeps."""

_PAGES = Path(__file__).parent / "pages"
_COMMON = ("common.css", "common.js", "icon.svg")
_EXACT = 2**53
_QUALITY = 80


class PageFolder:
    """A page's folder in an output. One process writes it at a time; its readers may have it open meanwhile.

    Files of data are named by their digests and never change, so that a page which is open finds what it was told of,
    and one that is written again costs what has changed. `meta.js` alone is replaced, last.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._folder = folder
        self._present = {path for path, _ in storage.list(f"{folder}/data")}
        self._named: set[str] = set()
        self._named_before: set[str] = set()

    def add(self, name: str, value: Any) -> str:
        """A file of data, named in the next `meta`. Returns its place as the page knows it, for `load` in common.js.

        `value` is what JSON can say; NaN and infinities are not.
        """
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        place = f"data/{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.js"
        path = f"{self._folder}/{place}"
        if path not in self._present:
            self._storage.write(path, _script(place, text))
            self._present.add(path)
        self._named.add(path)
        return place

    def publish(self, meta: Mapping[str, Any]) -> None:
        """Afterwards the page shows what was added since the last call, and files of data before that are gone.

        Those of the last call stay, for pages that are open.
        """
        text = json.dumps(meta, separators=(",", ":"), allow_nan=False)
        path = f"{self._folder}/data/meta.js"
        self._storage.write(path, _script("data/meta.js", text))
        for old in self._present - self._named - self._named_before - {path}:
            self._storage.delete(old)
        self._present = self._named | self._named_before
        self._named, self._named_before = set(), self._named

    def write_page(self, name: str, files: Sequence[str]) -> str:
        """The page itself with the named files of pages/ and those that all pages share. Returns its path."""
        for file in (*_COMMON, *files, name):
            self._storage.write(f"{self._folder}/{file}", (_PAGES / file).read_bytes())
        return f"{self._folder}/{name}"


def _script(place: str, text: str) -> bytes:
    """One call with two literals. All of it is ASCII; `<` is escaped too, so that it is harmless in any other file."""
    literal = json.dumps(text).replace("<", "\\u003c")
    return f"latentmill.receive({json.dumps(place)}, JSON.parse({literal}));\n".encode("ascii")


def encode_columns(table: pa.Table, *, whole: bool = False) -> list[dict[str, Any]]:
    """The columns of a table as `Columns` in common.js reads them: each a `name`, a `kind` and its values.

    Numbers are as JSON has them. All else is text, each different one once in `texts`, and `codes` says which of them
    each row has; -1 is null. A text of more than MAX_TEXT characters is cut, unless `whole`.
    """
    return [_encode(name, column, whole=whole) for name, column in zip(table.column_names, table.columns, strict=True)]


def _encode(name: str, column: pa.ChunkedArray, *, whole: bool) -> dict[str, Any]:
    kind = column.type
    if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and _is_exact(column)):
        numbers = column.to_pylist()
        if pa.types.is_float32(kind):
            numbers = [None if value is None else float(str(np.float32(value))) for value in numbers]
        return {"name": name, "kind": "number", "numbers": [_finite(value) for value in numbers]}
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind):
        column = column.cast(pa.string())  # Python's own times stop at microseconds
    codes: dict[str, int] = {}
    rows = [-1 if value is None else codes.setdefault(_text(value), len(codes)) for value in column.to_pylist()]
    texts = list(codes) if whole else [text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…" for text in codes]
    return {"name": name, "kind": "text", "texts": texts, "codes": rows}


def _is_exact(column: pa.ChunkedArray) -> bool:
    """Whether JavaScript's numbers hold all of them."""
    return all(value is None or abs(value) <= _EXACT for value in column.to_pylist())


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def thumbnail(png: bytes, side: int, size: tuple[int, int] | None = None) -> bytes:
    """A picture of at most `side` pixels a side, never enlarged, as WebP; it says how it came about as the PNG does.

    Raises ValueError for anything but a PNG, of that `size` if it is given.
    """
    picture = Image.fromarray(decode_png(png, size))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, method=2, xmp=xmp.PACKET.encode())
    return buffer.getvalue()
