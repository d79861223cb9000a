"""Pixels to PNG bytes and back; the same pixels and text always give the same bytes."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image, PngImagePlugin

from latentmill.engine.types import Pixels

MAX_PIXELS = 4096 * 4096
"""The largest picture that a job can make."""

_COMPRESSION = 6


def encode_png(pixels: Pixels, parameters: str | None = None) -> bytes:
    """`(h, w, 3) uint8` RGB as a PNG, with `parameters` as its text chunk of that name."""
    text = PngImagePlugin.PngInfo()
    if parameters is not None:
        text.add_text("parameters", parameters)  # tEXt for Latin-1, iTXt (UTF-8) for everything else
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_COMPRESSION, pnginfo=text)
    return buffer.getvalue()


def decode_png(data: bytes, size: tuple[int, int] | None = None) -> Pixels:
    """The pixels of a PNG as `(h, w, 3) uint8` RGB. Raises ValueError for anything else.

    `size` is the width and the height that it must have. The header says so, and is believed before the rest is
    unpacked: 500 kB may unpack to 3 GB.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS or (size is not None and image.size != size):
                expected = f"at most {MAX_PIXELS:,} pixels" if size is None else "{}x{}".format(*size)
                raise ValueError(f"its size is {image.width}x{image.height}, not {expected}")
            if image.mode != "RGB":
                raise ValueError(f"its mode is {image.mode}, not RGB")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not readable as a PNG: {error}") from error


def pixel_sha256(pixels: Pixels) -> str:
    """SHA-256 of the pixels in row order, RGB: it survives another PNG encoder."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def blank(pixels: Pixels) -> Pixels:
    """A black picture of the same size."""
    return np.zeros_like(pixels)
