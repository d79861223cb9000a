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
"""Blocks with a singular value this close to a threshold are computed again in the library's own way."""
_EDGE = 1e-8
"""Likewise blocks with a pixel this close to a whole number."""
_RESIDUAL = 1e-12
"""Likewise blocks whose singular vector is less exact than this."""
_TINY = 1e-300
"""In place of zero below a fraction."""


def embed_watermark(pixels: Pixels, text: str, method: str) -> Pixels:
    """`(h, w, 3) uint8` RGB -> the same with `text` in it as UTF-8. Raises EngineError for too small a picture."""
    _check(pixels, method)
    yuv = cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV)
    plane = _colour_plane(yuv)
    low, horizontal, vertical, diagonal = _haar(plane)
    blocks = _blocks(low)
    bits = np.resize(np.unpackbits(np.frombuffer(text.encode(), np.uint8)), len(blocks))

    def finished(marked: Floats) -> Floats:
        _put_blocks(low, marked)
        # The library swaps the horizontal and the vertical band on the way back.
        return _inverse_haar(low, vertical, horizontal, diagonal)

    if method == "dwtDctSvd":
        marked = _mark_singular_values(blocks, bits)
        done = finished(marked)
        edge = _at_an_edge(done)
        if edge.any():
            marked[edge] = _mark_by_svd(blocks[edge], bits[edge])
            done = finished(marked)
    else:
        done = finished(_mark_coefficients(blocks, bits))
    plane[:] = done
    return np.asarray(cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB), np.uint8)


def read_watermark(pixels: Pixels, n_bytes: int, method: str) -> bytes:
    """The `n_bytes` that the picture's watermark decodes to. A picture without one gives bytes too."""
    _check(pixels, method)
    blocks = _blocks(_low_band(_colour_plane(cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV))))
    values = _read_singular_values(blocks) if method == "dwtDctSvd" else np.abs(_greatest_coefficients(blocks))
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


def _mark_by_svd(blocks: Floats, bits: NDArray[np.uint8]) -> Floats:
    """Method dwtDctSvd as in the library: a bit moves the greatest singular value of its block's cosine transform."""
    u, s, v = np.linalg.svd(_cosine(blocks))
    s[:, 0] = _moved(s[:, 0], bits)
    return _cosine(u @ (s[:, :, None] * v), inverse=True)


def _mark_singular_values(blocks: Floats, bits: NDArray[np.uint8]) -> Floats:
    """The same but for the last digits, in a third of the time: the change of the one singular value is added.

    Where these digits could matter, the library's way is taken.
    """
    cosines = _cosine(blocks)
    values, vectors, sure = _greatest_singular_values(cosines)
    factors = np.zeros_like(values)
    np.divide(_moved(values, bits) - values, values, out=factors, where=sure)
    images = cosines @ vectors
    marked = _cosine(cosines + factors[:, None, None] * images * vectors.swapaxes(1, 2), inverse=True)
    sure &= ~_near_a_step(values, _STRENGTH)
    if not sure.all():
        marked[~sure] = _mark_by_svd(blocks[~sure], bits[~sure])
    return marked


def _greatest_singular_values(matrices: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """`(n, 4, 4)` -> the values `(n,)`, their right vectors `(n, 4, 1)`, and where both are right to about 12 digits.

    The Gram matrix is squared four times, so that its greatest eigenvalue dominates. None is greater than one of more
    than half of the trace, and the others are at least the rest of it away: so the residual bounds the vector's error.
    """
    gram = np.ascontiguousarray(matrices.swapaxes(1, 2)) @ matrices
    trace = np.trace(gram, axis1=1, axis2=2)
    power = gram / np.maximum(trace, _TINY)[:, None, None]
    for _ in range(4):
        power = power @ power
    column = np.argmax(np.diagonal(power, axis1=1, axis2=2), axis=1)[:, None, None]
    vectors = np.take_along_axis(power, column, axis=2)
    vectors /= np.maximum(_norms(vectors), _TINY)
    images = gram @ vectors
    squares = vectors.swapaxes(1, 2) @ images
    residuals = _norms(images - squares * vectors)[:, 0, 0]
    sure = residuals < _RESIDUAL * (2 * squares[:, 0, 0] - trace)
    return np.sqrt(squares[:, 0, 0]), vectors, sure


def _norms(vectors: Floats) -> Floats:
    return np.asarray(np.sqrt(np.sum(vectors * vectors, axis=1, keepdims=True)), np.float64)


def _near_a_step(values: Floats, step: float) -> NDArray[np.bool_]:
    """Where the last digits decide on which side of a multiple of `step` a value is."""
    near: NDArray[np.bool_] = np.abs(values - np.round(values / step) * step) < _NEARLY
    return near


def _at_an_edge(plane: Floats) -> NDArray[np.bool_]:
    """Of which blocks a pixel is so close to a whole number that the last digits decide what it is cut to."""
    side = 2 * _BLOCK
    off = np.rint(plane)
    np.subtract(plane, off, out=off)
    near = np.asarray(np.abs(off, out=off) < _EDGE)
    if not near.any():
        return np.zeros(0, np.bool_)
    rows, columns = (length // side for length in plane.shape)
    whole = near[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return np.asarray(np.any(whole, axis=(1, 3)), np.bool_).reshape(-1)


def _read_singular_values(blocks: Floats) -> Floats:
    """`(n, 4, 4)` -> the greatest singular values `(n,)` of their cosine transforms."""
    cosines = _cosine(blocks)
    values, _, sure = _greatest_singular_values(cosines)
    unsure = ~sure | _near_a_step(values, _STRENGTH / 2)
    values[unsure] = np.linalg.svd(cosines[unsure])[1][:, 0]
    return values


def _mark_coefficients(blocks: Floats, bits: NDArray[np.uint8]) -> Floats:
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
    x = plane * _HAAR
    low, high = (x[0::2] + x[1::2]) * _HAAR, (x[0::2] - x[1::2]) * _HAAR
    left, right = np.s_[:, 0::2], np.s_[:, 1::2]
    return low[left] + low[right], high[left] + high[right], low[left] - low[right], high[left] - high[right]


def _low_band(plane: Pixels) -> Floats:
    """The first of the four alone, in the same digits."""
    x = plane * _HAAR
    low = (x[0::2] + x[1::2]) * _HAAR
    return np.asarray(low[:, 0::2] + low[:, 1::2], np.float64)


def _inverse_haar(low: Floats, horizontal: Floats, vertical: Floats, diagonal: Floats) -> Floats:
    height, width = low.shape
    lows, highs = np.empty((2, height, 2 * width))
    done = np.empty((2 * height, 2 * width))
    _interleave(low, vertical, lows[:, 0::2], lows[:, 1::2])
    _interleave(horizontal, diagonal, highs[:, 0::2], highs[:, 1::2])
    _interleave(lows, highs, done[0::2], done[1::2])
    return done


def _interleave(mean: Floats, difference: Floats, sums: Floats, differences: Floats) -> None:
    """Sum and difference into every second place."""
    mean, difference = mean * _HAAR, difference * _HAAR
    np.add(mean, difference, out=sums)
    np.subtract(mean, difference, out=differences)


def _blocks(band: Floats) -> Floats:
    """`(h, w)` -> whole blocks `(n, 4, 4)`, row by row."""
    rows, columns = (side // _BLOCK for side in band.shape)
    whole = band[: rows * _BLOCK, : columns * _BLOCK]
    return whole.reshape(rows, _BLOCK, columns, _BLOCK).swapaxes(1, 2).reshape(-1, _BLOCK, _BLOCK)


def _put_blocks(band: Floats, blocks: Floats) -> None:
    rows, columns = (side // _BLOCK for side in band.shape)
    whole = blocks.reshape(rows, columns, _BLOCK, _BLOCK).swapaxes(1, 2)
    band[: rows * _BLOCK, : columns * _BLOCK] = whole.reshape(rows * _BLOCK, columns * _BLOCK)
