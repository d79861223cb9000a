"""The columns `image` and `mask` of a manifest: places made absolute, files read once for their digest and size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from latentmill.jobs.manifests.fields import MAX_SIDE, shorten
from latentmill.jobs.manifests.images import ImageError, decode, read_file
from latentmill.jobs.store.urls import display_url

DIGESTS = {"image": "image_sha256", "mask": "mask_sha256"}
"""Columns of the snapshot beside those of the manifest: the digests of the files that rows name."""

_READERS = 8
_REMEMBERED = 65_536
_STEP = 32
"""Sides that follow from an image are multiples of this, as in the original script."""


@dataclass(frozen=True, slots=True)
class _File:
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """How rows with an image are read. At most eight pictures are in memory at the same time.

    With `sized_by_image`, a row that says neither width nor height is as large as its image: scaled down to the pixels
    of the model's own size (`most_pixels`) if it has more, and its sides rounded down to multiples of 32.
    """

    factor: int
    most_pixels: int
    sized_by_image: bool
    _look_up: Any = field(default_factory=lambda: lru_cache(_REMEMBERED)(_look_at))

    def add(self, columns: dict[str, pa.Array], folder: str, faults: dict[int, list[str]]) -> None:
        """Check the rows of a batch that have no fault yet; afterwards `columns` has the digests, and the sizes."""
        count = len(columns["prompt"])
        named = {name: [_place(text, folder) for text in _texts(columns, name, count)] for name in DIGESTS}
        valid = [row for row in range(count) if row not in faults]
        files = self._read({places[row] for places in named.values() for row in valid})
        found: dict[str, list[_File | None]] = {name: [None] * count for name in DIGESTS}
        for row in valid:
            for name, places in named.items():
                file = files.get(places[row])
                if isinstance(file, str):
                    faults.setdefault(row, []).append(f"{name} {shorten(display_url(str(places[row])), 200)} {file}")
                else:
                    found[name][row] = file
            fault = None if row in faults else self._fault(columns, row, found["image"][row], found["mask"][row])
            if fault is not None:
                faults[row] = [fault]
        for name, digest in DIGESTS.items():
            if name in columns:
                columns[name] = pa.array(named[name], pa.string())
                columns[digest] = pa.array([None if file is None else file.sha256 for file in found[name]], pa.string())
        if self.sized_by_image:
            self._add_sizes(columns, found["image"])

    def _read(self, places: set[str | None]) -> Mapping[str | None, _File | str]:
        wanted = sorted(place for place in places if place is not None)
        if not wanted:
            return {}
        with ThreadPoolExecutor(min(_READERS, len(wanted))) as threads:
            return dict(zip(wanted, threads.map(self._look_up, wanted), strict=True))

    @staticmethod
    def _fault(columns: Mapping[str, pa.Array], row: int, image: _File | None, mask: _File | None) -> str | None:
        if image is None:
            lonely = "mask" if mask is not None else "strength"
            given = mask is not None or (lonely in columns and columns[lonely][row].is_valid)
            return f"{lonely} is given without an image; name one, or leave it out" if given else None
        if mask is not None and (mask.width, mask.height) != (image.width, image.height):
            return f"mask is {mask.width}x{mask.height}, its image {image.width}x{image.height}; give both one size"
        return None

    def _add_sizes(self, columns: dict[str, pa.Array], images: Sequence[_File | None]) -> None:
        widths, heights = columns["width"].to_pylist(), columns["height"].to_pylist()
        for row, image in enumerate(images):
            if image is not None and widths[row] is None and heights[row] is None:
                widths[row], heights[row] = self._size_of(image)
        columns["width"], columns["height"] = pa.array(widths, pa.int64()), pa.array(heights, pa.int64())

    def _size_of(self, image: _File) -> tuple[int, int]:
        scale = min(1.0, (self.most_pixels / (image.width * image.height)) ** 0.5)
        return self._side(image.width * scale), self._side(image.height * scale)

    def _side(self, length: float) -> int:
        step = max(_STEP, self.factor)
        return min(max(int(length) // step * step, step), MAX_SIDE // step * step)


def _look_at(place: str) -> _File | str:
    """A file's digest and size, or why it cannot be used. Its address becomes part of plan and rows."""
    if display_url(place) != place:
        return "carries a user, a password or a query; give the plain address, and credentials by environment"
    try:
        data = read_file(place)
        picture = decode(data)
    except ImageError as error:
        return str(error)
    return _File(hashlib.sha256(data).hexdigest(), *picture.size)


def _texts(columns: Mapping[str, pa.Array], name: str, count: int) -> list[str | None]:
    return columns[name].to_pylist() if name in columns else [None] * count


def _place(text: str | None, folder: str) -> str | None:
    """The absolute path or URL that a row means: a relative one is relative to its manifest's folder."""
    if not text:
        return None
    if "://" in text:
        return text
    text = os.path.expanduser(text)  # noqa: PTH111 - text as fsspec wants it, in a folder that may be a URL
    return text if text.startswith("/") else f"{folder.rstrip('/')}/{text}"
