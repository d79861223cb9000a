"""Reading the invisible watermark of picture files back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from latentmill.engine import WATERMARK_METHODS, WATERMARK_MIN_PIXELS, read_watermark, watermark_bit_accuracy
from latentmill.engine.types import Pixels
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests.fields import nearest, shorten
from latentmill.jobs.store.urls import allowed_filesystem, display_url
from latentmill.jobs.watermark_bits import bits_needed, matching_bits

MAX_PIXELS = 1 << 25
"""Twice the largest picture that a job can make; reading a watermark takes 20 bytes a pixel."""

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WatermarkReading:
    """What one file says. `text` is what was read under the method that fitted best, damaged letters and all."""

    file: str
    method: str
    text: str
    bit_accuracy: float
    bits: int
    bits_matching: int
    bits_needed: int

    @property
    def found(self) -> bool:
        """Whether the watermark that was looked for is there, beyond chance."""
        return self.bits_matching >= self.bits_needed

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"found": self.found}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """A file that could not be read, and why."""

    file: str
    error: str

    @property
    def found(self) -> bool:
        """No watermark was found in it."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"found": False}


def read_watermarks(files: Sequence[str], *, text: str, method: str | None = None) -> list[WatermarkReading | Unread]:
    """One reading per file, by `method` or by whichever of all fits best.

    Raises UsageError if none of the files can be read as a picture; one among others is `Unread`.
    """
    if method is not None and method not in WATERMARK_METHODS:
        raise UsageError(
            f"watermark method {shorten(method)} does not exist{nearest(method, WATERMARK_METHODS)}; "
            f"there is {', '.join(WATERMARK_METHODS)}"
        )
    if bits_needed(8 * len(text.encode())) is None:
        raise UsageError(
            f"the text to look for, {shorten(text)}, has too few bits to be told from chance; "
            "give the one that was embedded, 3 bytes or more"
        )
    methods = WATERMARK_METHODS if method is None else (method,)
    readings: list[WatermarkReading | Unread] = []
    for file in files:
        try:
            readings.append(_read_file(file, text, methods))
        except UsageError as error:
            readings.append(Unread(file=file, error=str(error)))
    failed = [reading for reading in readings if isinstance(reading, Unread)]
    if len(failed) == len(readings):
        more = f" (nor can {len(failed) - 1:,} more)" if len(failed) > 1 else ""
        raise UsageError(failed[0].error + more)
    return readings


def _read_file(file: str, text: str, methods: Sequence[str]) -> WatermarkReading:
    pixels = _load(file)
    accuracy, method = max((watermark_bit_accuracy(pixels, text, method), method) for method in methods)
    n_bytes = len(text.encode())
    return WatermarkReading(
        file=file,
        method=method,
        text=read_watermark(pixels, n_bytes, method).decode("utf-8", "replace"),
        bit_accuracy=accuracy,
        bits=8 * n_bytes,
        bits_matching=matching_bits(accuracy, 8 * n_bytes),
        bits_needed=bits_needed(8 * n_bytes) or 0,
    )


def _load(file: str) -> Pixels:
    fs, inside = allowed_filesystem(file)
    try:
        info = fs.info(inside)
        if info["type"] != "file" or info["size"] > MAX_FILE_BYTES:
            raise ValueError(f"it is no regular file, or has more than {MAX_FILE_BYTES:,} bytes")
        with Image.open(io.BytesIO(fs.cat_file(inside))) as image:
            if image.width * image.height > MAX_PIXELS:  # as the header says, before anything is unpacked
                raise UsageError(
                    f"{display_url(file)} has {image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,} in all; "
                    f"give the picture as it was generated"
                )
            pixels: Pixels = np.asarray(image.convert("RGB"))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{display_url(file)} does not exist or is no regular file; give picture files") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{display_url(file)} cannot be read as a picture: {' '.join(str(error).split())}") from None
    if pixels.shape[0] * pixels.shape[1] < WATERMARK_MIN_PIXELS:
        raise UsageError(
            f"{display_url(file)} has {pixels.shape[1]}x{pixels.shape[0]} pixels; "
            f"a watermark needs at least {WATERMARK_MIN_PIXELS:,} in all, for example 256x256"
        )
    return pixels
