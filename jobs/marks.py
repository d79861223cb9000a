"""Reading the invisible mark of picture files back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from engine import WATERMARK_METHODS, WATERMARK_MIN_PIXELS, read_watermark, watermark_bit_accuracy
from engine.types import Pixels
from jobs.errors import UsageError
from jobs.fields import nearest, shorten
from jobs.urls import allowed_filesystem, display_url

FOUND_FROM = 0.9
"""Share of equal bits from which a mark counts as found: chance gives one half, JPEG and resizing cost a few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkReading:
    """What one file says. `text` is what was read under the method that fitted best, damaged letters and all."""

    file: str
    method: str
    text: str
    bit_accuracy: float

    @property
    def found(self) -> bool:
        """Whether the mark that was looked for is there."""
        return self.bit_accuracy >= FOUND_FROM

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"found": self.found}


def read_marks(files: Sequence[str], *, text: str, method: str | None = None) -> list[MarkReading]:
    """One reading per file, by `method` or by whichever of all fits best. Raises UsageError for what is no picture."""
    if method is not None and method not in WATERMARK_METHODS:
        raise UsageError(
            f"watermark method {shorten(method)} does not exist{nearest(method, WATERMARK_METHODS)}; "
            f"there is {', '.join(WATERMARK_METHODS)}"
        )
    if not text:
        raise UsageError("the text to look for is empty; give the one that was embedded, 1 to 32 bytes")
    methods = WATERMARK_METHODS if method is None else (method,)
    return [_read_file(file, text, methods) for file in files]


def _read_file(file: str, text: str, methods: Sequence[str]) -> MarkReading:
    pixels = _load(file)
    accuracy, method = max((watermark_bit_accuracy(pixels, text, method), method) for method in methods)
    raw = read_watermark(pixels, len(text.encode()), method)
    return MarkReading(file=file, method=method, text=raw.decode("utf-8", "replace"), bit_accuracy=accuracy)


def _load(file: str) -> Pixels:
    fs, inside = allowed_filesystem(file)
    try:
        with Image.open(io.BytesIO(fs.cat_file(inside))) as image:
            pixels: Pixels = np.asarray(image.convert("RGB"))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{display_url(file)} does not exist or is a folder; give picture files") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{display_url(file)} cannot be read as a picture: {' '.join(str(error).split())}") from None
    if pixels.shape[0] * pixels.shape[1] < WATERMARK_MIN_PIXELS:
        raise UsageError(
            f"{display_url(file)} has {pixels.shape[1]}x{pixels.shape[0]} pixels; "
            f"a mark needs at least {WATERMARK_MIN_PIXELS:,} in all, for example 256x256"
        )
    return pixels
