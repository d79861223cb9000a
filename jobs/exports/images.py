"""Pictures in other forms: each takes a PNG of the dataset and gives the same bytes for the same picture, every time.

The XMP packet, which says that a picture was made by a model, goes along; other text of a PNG stays behind.
"""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from latentmill.jobs.ledger.pictures import decode_png

_JPEG_QUALITY = 95


def png(data: bytes, size: tuple[int, int], quality: int | None) -> bytes:  # noqa: ARG001 - all of them are called alike
    """The picture as it is."""
    return data


def webp(data: bytes, size: tuple[int, int], quality: int | None) -> bytes:
    """Lossless, unless a quality is given."""
    if quality is None:
        return _encode(data, size, format="WEBP", lossless=True, quality=75, method=4)
    return _encode(data, size, format="WEBP", quality=quality, method=4)


def jpeg(data: bytes, size: tuple[int, int], quality: int | None) -> bytes:
    """With colours in full resolution."""
    return _encode(data, size, format="JPEG", quality=quality or _JPEG_QUALITY, subsampling=0)


def _encode(data: bytes, size: tuple[int, int], **options: Any) -> bytes:
    """Raises ValueError for what is no PNG of that size."""
    pixels = decode_png(data, size)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as source:
        xmp = source.info.get("xmp")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options, **({} if xmp is None else {"xmp": xmp}))
    return buffer.getvalue()
