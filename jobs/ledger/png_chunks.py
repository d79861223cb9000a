"""The chunks of a PNG file that are no pixels: text and XMP put in and read back, and whether others are there."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES = len(_SIGNATURE) + 25
"""The signature and IHDR, which is always first and of one size."""


def text_chunk(keyword: str, text: str) -> bytes:
    """`text` as tEXt if Latin-1 holds all of it, else as iTXt: what Pillow writes, and what web UIs read."""
    try:
        return _chunk(b"tEXt", b"%s\0%s" % (keyword.encode("latin-1"), text.encode("latin-1")))
    except UnicodeEncodeError:
        return utf8_chunk(keyword, text)


def utf8_chunk(keyword: str, text: str) -> bytes:
    """`text` as iTXt: UTF-8, not compressed, in no named language."""
    return _chunk(b"iTXt", b"%s\0\0\0\0\0%s" % (keyword.encode("latin-1"), text.encode()))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))))


def with_chunks(png: bytes, chunks: bytes) -> bytes:
    """The file with those chunks before its pixels."""
    return png[:_HEADER_BYTES] + chunks + png[_HEADER_BYTES:]


def read_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk, in order, up to the first that is cut short; none of what is no PNG."""
    if not png.startswith(_SIGNATURE):
        return
    place = len(_SIGNATURE)
    while place + 12 <= len(png):
        (size,) = struct.unpack_from(">I", png, place)
        end = place + 12 + size
        if end > len(png):
            return
        yield png[place + 4 : place + 8], png[place + 8 : end - 4]
        place = end


def read_utf8_text(png: bytes, keyword: str) -> bytes | None:
    """The text of the first iTXt chunk of that keyword that is not compressed, or None."""
    start = keyword.encode("latin-1") + b"\0\0"
    for kind, body in read_chunks(png):
        if kind == b"iTXt" and body.startswith(start):
            fields = body[len(start) + 1 :].split(b"\0", 2)
            if len(fields) == 3:
                return fields[2]
    return None
