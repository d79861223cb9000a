"""The invisible watermark of the original script: the same bits as the library invisible-watermark, but faster.

The watermark is a public constant that says "made by a machine"; it does not prove where a picture comes from. It is in
the colour plane U, in the low band of a Haar transform: one bit in each block of 4x4 coefficients, repeated to the end
of the picture. The library processes one block after the other; here all blocks are one array, and torch, which the
library imports, is not needed. The tests compare both, bit by bit.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from latentmill.engine.types import WATERMARK_METHODS, WATERMARK_MIN_PIXELS, EngineError, Pixels

Floats = NDArray[np.float64]

_STRENGTH = 36.0
_BLOCK = 4
_HAAR = 0.7071067811865476
_NEARLY = 1e-6
"""Singular values this close to a threshold are computed again in the library's own way."""


def embed_watermark(pixels: Pixels, text: str, method: str) -> Pixels:
    """`(h, w, 3) uint8` RGB -> the same with `text` in it as UTF-8. Raises EngineError for too small a picture."""
    _check(pixels, method)
    yuv = cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV)
    plane = _colour_plane(yuv)
    low, horizontal, vertical, diagonal = _haar(plane)
    blocks = _blocks(low)
    bits = np.resize(np.unpackbits(np.frombuffer(text.encode(), np.uint8)), len(blocks))
    changed = _embed_in_singular_values(blocks, bits) if method == "dwtDctSvd" else _embed_in_coefficients(blocks, bits)
    _put_blocks(low, changed)
    # The library swaps the horizontal and the vertical band on the way back.
    plane[:] = _inverse_haar(low, vertical, horizontal, diagonal)
    return np.asarray(cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB), np.uint8)


def read_watermark(pixels: Pixels, n_bytes: int, method: str) -> bytes:
    """The `n_bytes` that the picture's watermark decodes to. A picture without one gives bytes too."""
    _check(pixels, method)
    low, *_ = _haar(_colour_plane(cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV)))
    blocks = _blocks(low)
    values = _greatest_singular_values(blocks) if method == "dwtDctSvd" else np.abs(_greatest_coefficients(blocks))
    votes = values % _STRENGTH > _STRENGTH / 2
    places = np.arange(len(votes)) % (8 * n_bytes)
    ones, all_votes = (np.bincount(places, weights, minlength=8 * n_bytes) for weights in (votes, None))
    return np.packbits(ones / all_votes * 255 > 127).tobytes()


def watermark_bit_accuracy(pixels: Pixels, text: str, method: str) -> float:
    """Share of the bits of `text` that are read back from the picture: 1.0 is exact, about 0.5 is no watermark."""
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


def _colour_plane(yuv: Pixels) -> Pixels:
    """U, cut to whole blocks of four pixels: a view."""
    height, width = yuv.shape[:2]
    return yuv[: height // 4 * 4, : width // 4 * 4, 1]


def _embed_in_singular_values(blocks: Floats, bits: NDArray[np.uint8]) -> Floats:
    """dwtDctSvd: each bit moves the greatest singular value of its block's cosine transform."""
    u, s, v = np.linalg.svd(_cosine(blocks))
    s[:, 0] = _moved(s[:, 0], bits)
    return _cosine(u @ (s[:, :, None] * v), inverse=True)


def _greatest_singular_values(blocks: Floats) -> Floats:
    """`(n, 4, 4)` -> `(n,)`. Without the vectors they cost half, and differ in the last digits."""
    cosines = _cosine(blocks)
    values = np.asarray(np.linalg.svd(cosines, compute_uv=False)[:, 0], np.float64)
    step = _STRENGTH / 2
    close = np.abs(values - np.round(values / step) * step) < _NEARLY
    values[close] = np.linalg.svd(cosines[close])[1][:, 0]
    return values


def _embed_in_coefficients(blocks: Floats, bits: NDArray[np.uint8]) -> Floats:
    """dwtDct: each bit moves the greatest coefficient of its block but the first, and keeps its sign."""
    values = _greatest_coefficients(blocks)
    moved = np.where(values >= 0, 1.0, -1.0) * _moved(np.abs(values), bits)
    flat = blocks.reshape(len(blocks), -1).copy()
    np.put_along_axis(flat, _greatest(flat), moved[:, None], axis=1)
    return flat.reshape(blocks.shape)


def _greatest_coefficients(blocks: Floats) -> Floats:
    flat = blocks.reshape(len(blocks), -1)
    return np.take_along_axis(flat, _greatest(flat), axis=1)[:, 0]


def _greatest(flat: Floats) -> NDArray[np.intp]:
    places: NDArray[np.intp] = np.argmax(np.abs(flat[:, 1:]), axis=1, keepdims=True) + 1
    return places


def _moved(values: Floats, bits: NDArray[np.uint8]) -> Floats:
    """Each value moved within its step: to a quarter of it for a 0, to three quarters for a 1."""
    return (values // _STRENGTH + 0.25 + 0.5 * bits) * _STRENGTH


def _cosine(blocks: Floats, *, inverse: bool = False) -> Floats:
    """The cosine transform of each block `(n, 4, 4)`: OpenCV's own, rows first and then columns, all in two calls."""
    flags = cv2.DCT_ROWS | (cv2.DCT_INVERSE if inverse else 0)

    def rows_then_turn(stack: Floats) -> Floats:
        done = cv2.dct(np.ascontiguousarray(stack).reshape(-1, _BLOCK), flags=flags)
        return np.asarray(done, np.float64).reshape(stack.shape).swapaxes(1, 2)

    return np.ascontiguousarray(rows_then_turn(rows_then_turn(blocks)))


def _haar(plane: Pixels) -> tuple[Floats, Floats, Floats, Floats]:
    """`(h, w)` -> low band and horizontal, vertical and diagonal details, each `(h / 2, w / 2)`."""
    x = plane.astype(np.float64) * _HAAR
    low, high = (x[0::2] + x[1::2]) * _HAAR, (x[0::2] - x[1::2]) * _HAAR
    left, right = np.s_[:, 0::2], np.s_[:, 1::2]
    return low[left] + low[right], high[left] + high[right], low[left] - low[right], high[left] - high[right]


def _inverse_haar(low: Floats, horizontal: Floats, vertical: Floats, diagonal: Floats) -> Floats:
    pairs = ((low, vertical), (horizontal, diagonal))
    rows = [_interleaved(mean * _HAAR, difference * _HAAR, 1) for mean, difference in pairs]
    return _interleaved(rows[0] * _HAAR, rows[1] * _HAAR, 0)


def _interleaved(mean: Floats, difference: Floats, axis: int) -> Floats:
    """Sum and difference in turn along an axis."""
    height, width = mean.shape
    return np.stack([mean + difference, mean - difference], axis + 1).reshape(
        (2 * height, width) if axis == 0 else (height, 2 * width)
    )


def _blocks(band: Floats) -> Floats:
    """`(h, w)` -> whole blocks `(n, 4, 4)`, row by row."""
    rows, columns = (side // _BLOCK for side in band.shape)
    whole = band[: rows * _BLOCK, : columns * _BLOCK]
    return whole.reshape(rows, _BLOCK, columns, _BLOCK).swapaxes(1, 2).reshape(-1, _BLOCK, _BLOCK)


def _put_blocks(band: Floats, blocks: Floats) -> None:
    rows, columns = (side // _BLOCK for side in band.shape)
    whole = blocks.reshape(rows, columns, _BLOCK, _BLOCK).swapaxes(1, 2)
    band[: rows * _BLOCK, : columns * _BLOCK] = whole.reshape(rows * _BLOCK, columns * _BLOCK)
