"""`latentmill compare --out`: a page of the pairs that changed, which a browser opens from a folder or a bucket."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentmill.engine.types import Pixels
from latentmill.jobs.compare.compare import CompareError, CompareProgress, Comparison, Pair, compare, nights
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.ledger.pictures import decode_png, encode_png
from latentmill.jobs.show.page import PageFolder, thumbnail
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.store.urls import allowed_filesystem, display_url, refuse_inside

_SIDE = 1024
"""Pixels of the longer side of the pictures on the page."""
_THREADS = 8
_FILES = ("compare.css", "compare.js")
_PICTURE = r"pictures/\d{5}-(?:before|after|difference)-[0-9a-f]{16}\.webp"
_OWN = re.compile(
    rf"(?:compare\.(?:html|css|js|json)|common\.(?:css|js)|icon\.svg|data/[\w.-]+\.js|{_PICTURE})", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class ShownComparison:
    """What differs, and where the page of it is, if one was written."""

    found: Comparison
    page: str | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self.found.to_dict(), "page": self.page}


def compare_outputs(
    first: str,
    second: str | None,
    out: str | None,
    *,
    top: int,
    tolerance: float = 0.0,
    ignored: Sequence[str] = (),
    on_progress: Callable[[CompareProgress], None] = lambda _: None,
) -> ShownComparison:
    """Compare two outputs; afterwards there is a page of it in the folder or at the URL `out`, if there is an `out`.

    Without `out` nothing is written. Raises CompareError, also if the place holds anything but such a page.
    """
    try:
        before, after = nights(first, second)
        place = None if out is None else _Place(out, (before, after))
        found = compare(before, after, top=top, tolerance=tolerance, ignored=ignored, on_progress=on_progress)
        page = None if place is None else place.write(found, on_progress)
    except JobError as error:
        raise CompareError(str(error)) from error
    return ShownComparison(found=found, page=page)


class _Place:
    """Where the page lies: an empty place, or one with an earlier page of this kind."""

    def __init__(self, out: str, datasets: Sequence[str]) -> None:
        for dataset in datasets:
            refuse_inside(out, dataset)
        whole = out if "://" in out else allowed_filesystem(out)[1]
        parent, _, self._name = whole.rstrip("/").rpartition("/")
        if parent.endswith(":/") or not self._name:
            raise UsageError(f"{display_url(out)} is a whole bucket or disk; name a folder in it with --out")
        self._storage = Storage.open(parent or "/")
        strange = next((path for path in self._files() if not _OWN.fullmatch(path)), None)
        if strange is not None:
            raise UsageError(f"{display_url(out)} holds something else ({strange}); name an empty place with --out")

    def _files(self) -> list[str]:
        return [path.removeprefix(f"{self._name}/") for path, _ in self._storage.list(self._name)]

    def write(self, found: Comparison, on_progress: Callable[[CompareProgress], None]) -> str:
        """Afterwards the page shows this comparison, and no picture of an earlier one is left. Returns its place."""
        folder = PageFolder(self._storage, self._name)
        shown, pictures, total = [], set(), len(found.pairs)
        with ThreadPoolExecutor(_THREADS) as pool:
            drawn = pool.map(lambda item: self._draw(found, *item), enumerate(found.pairs, start=1))
            for number, (pair, files) in enumerate(zip(found.pairs, drawn, strict=True), start=1):
                pictures |= set(files.values())
                shown.append({**pair.to_dict(), "pictures": files, "without": _without(pair)})
                on_progress(CompareProgress(phase="writing the page", done=number, total=total))
        told = found.to_dict()
        folder.publish({**told, "pairs": folder.add("pairs", shown)})
        self._storage.write(f"{self._name}/compare.json", (json.dumps(told, indent=2) + "\n").encode())
        page = folder.write_page("compare.html", _FILES)
        for old in self._files():
            if re.fullmatch(_PICTURE, old) and old not in pictures:
                self._storage.delete(f"{self._name}/{old}")
        return f"{self._storage.url.rstrip('/')}/{page}"

    def _draw(self, found: Comparison, number: int, pair: Pair) -> Mapping[str, str]:
        """Where the pictures of a pair lie now, those that may be shown."""
        sides = (("before", found.before, pair.before), ("after", found.after, pair.after))
        files = {which: side.file(row) for which, side, row in sides if _shown(row)}
        if len(files) == 2:
            one, other = (decode_png(data) for data in files.values())
            files["difference"] = encode_png(difference(one, other))
        return {which: self._write_picture(f"{number:05d}-{which}", data) for which, data in files.items()}

    def _write_picture(self, name: str, png: bytes) -> str:
        data = thumbnail(png, _SIDE)
        path = f"pictures/{name}-{hashlib.sha256(data).hexdigest()[:16]}.webp"
        self._storage.write(f"{self._name}/{path}", data)
        return path


def difference(one: Pixels, other: Pixels) -> Pixels:
    """Where two pictures (h, w, 3) differ: black where they are the same, the brighter the more, small ones lifted."""
    apart = np.abs(one.astype(np.int16) - other).max(axis=2)
    lifted = np.sqrt(apart / max(1, int(apart.max()))) * 255
    found: Pixels = np.repeat(lifted.round().astype(np.uint8)[:, :, None], 3, axis=2)
    return found


def _shown(row: Mapping[str, Any]) -> bool:
    """Only pictures that passed the safety check are shown, also where flagged ones were kept."""
    return row["status"] == "ok" and row["image"] is not None


def _without(pair: Pair) -> dict[str, str]:
    """What stands in place of a picture that is not shown."""
    told = {
        which: str(row["error"] or row["status"])
        for which, row in (("before", pair.before), ("after", pair.after))
        if not _shown(row)
    }
    return {**told, "difference": "not both are shown"} if told else {}
