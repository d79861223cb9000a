"""The invisible watermark of the original script, written and read with the same library (invisible-watermark).

The mark is a public constant in the picture: it says "made by a machine", proves no origin and hides nothing.
"""

from __future__ import annotations

import numpy as np
from imwatermark import WatermarkDecoder, WatermarkEncoder

from latentmill.engine.types import WATERMARK_METHODS, WATERMARK_MIN_PIXELS, EngineError, Pixels


def embed_watermark(pixels: Pixels, text: str, method: str) -> Pixels:
    """`(h, w, 3) uint8` RGB -> the same with `text` in it as UTF-8. Raises EngineError for one too small."""
    _check(pixels, method)
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", text.encode())
    # The library works on OpenCV's channel order.
    marked: Pixels = encoder.encode(np.ascontiguousarray(pixels[:, :, ::-1]), method)
    return np.ascontiguousarray(marked[:, :, ::-1])


def read_watermark(pixels: Pixels, n_bytes: int, method: str) -> bytes:
    """The `n_bytes` that the picture's mark decodes to; any picture decodes to something."""
    _check(pixels, method)
    decoder = WatermarkDecoder("bytes", 8 * n_bytes)
    decoded: bytes = decoder.decode(np.ascontiguousarray(pixels[:, :, ::-1]), method)
    return decoded


def watermark_bit_accuracy(pixels: Pixels, text: str, method: str) -> float:
    """Share of the bits of `text` that are read back from the picture: 1.0 is exact, about 0.5 is no mark."""
    expected = np.frombuffer(text.encode(), dtype=np.uint8)
    found = np.frombuffer(read_watermark(pixels, len(expected), method), dtype=np.uint8)
    return float(np.mean(np.unpackbits(expected) == np.unpackbits(found)))


def _check(pixels: Pixels, method: str) -> None:
    if method not in WATERMARK_METHODS:
        raise EngineError(f"watermark method is {method!r}; there are {', '.join(WATERMARK_METHODS)}")
    height, width = pixels.shape[:2]
    if height * width < WATERMARK_MIN_PIXELS:
        raise EngineError(
            f"a picture of {width}x{height} is too small for the watermark, which needs {WATERMARK_MIN_PIXELS} pixels "
            f"(256x256): make it larger, or choose the watermark `none`"
        )
