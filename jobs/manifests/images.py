"""Pictures that rows start from: read and decoded within limits, and held to the digest that the plan has of them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from latentmill.engine import EngineError, SourceImage
from latentmill.engine.types import Mask, Pixels
from latentmill.jobs.errors import UsageError
from latentmill.jobs.store.errors import StorageError, describe, is_transient, remedy
from latentmill.jobs.store.urls import allowed_filesystem, display_url

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 1 << 25
FORMATS = ("PNG", "JPEG", "WEBP")

_REGULAR = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # never wait for the writer of a pipe
_SIXTEEN_BITS = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_EIGHT_BITS = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"})
_LARGE_PIXELS = 1 << 22
_one_large_picture = threading.Lock()
"""Pictures are decoded side by side, but large ones one after the other: one takes up to half a gigabyte."""

_KEPT_PICTURES = 8
"""A sweep asks for one picture many times over; those of a few rows are kept decoded."""


class ImageError(ValueError):
    """Why a picture cannot be used: what follows its name in a sentence, with the limit and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedImage:
    """What a row starts from, as its plan has it; the engine reads it when it begins with the row.

    `place` and `mask` are absolute paths or URLs.
    """

    place: str
    sha256: str
    mask: str | None = None
    mask_sha256: str | None = None

    def read(self, width: int, height: int) -> SourceImage:
        """Picture and mask at that size, of the planned bytes.

        Raises EngineError if they are gone or changed, StorageError if their store does not say.
        """
        return _read_planned(self, width, height)


@lru_cache(maxsize=_KEPT_PICTURES)
def _read_planned(image: PlannedImage, width: int, height: int) -> SourceImage:
    picture = _decode_planned("image", image.place, image.sha256)
    mask = None
    if image.mask is not None:
        mask = fit_mask(_decode_planned("mask", image.mask, image.mask_sha256), width, height)
    return SourceImage(pixels=fit(picture, width, height), mask=mask)


def _decode_planned(column: str, place: str, sha256: str | None) -> Image.Image:
    try:
        data = read_file(place)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ImageError(f"is not the planned file: its sha256 is {found}, not {sha256}; put that one back")
        return decode(data)
    except ImageError as error:
        raise EngineError(f"{column} {display_url(place)} {error}") from None


def fit(picture: Image.Image, width: int, height: int) -> Pixels:
    """`(h, w, 3) uint8`: scaled by Lanczos until it covers the size, as little as possible, and cut from its middle."""
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def fit_mask(picture: Image.Image, width: int, height: int) -> Mask:
    """`(h, w) bool`, True where it is lighter than middle grey; scaled and cut as its picture is."""
    return np.asarray(ImageOps.fit(picture.convert("L"), (width, height), Image.Resampling.LANCZOS)) >= 128


def read_file(place: str) -> bytes:
    """All bytes of a regular file at an allowed path or URL. Raises ImageError.

    Raises StorageError if its store does not say whether there is one.
    """
    try:
        fs, path = allowed_filesystem(place)
    except UsageError as error:
        raise ImageError(f"cannot be read: {error}") from None
    try:
        data = _read_local(path) if "file" in fs.protocol else _read_object(fs, path)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("does not exist; correct it, or leave it out") from None
    except Exception as error:  # fsspec's backends share no base class
        if is_transient(error):
            reason = f"cannot read {display_url(place)}: {describe(error)}; {remedy(error)}"
            raise StorageError(reason, transient=True) from error
        raise ImageError(f"cannot be read ({describe(error)}); check address, rights and credentials") from None
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"has more than {MAX_FILE_BYTES:,} bytes; give a smaller file")
    return data


def _read_local(path: str) -> bytes:
    handle = os.open(path, _REGULAR)
    try:
        _check_regular(regular=stat.S_ISREG(os.fstat(handle).st_mode))
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(handle)


def _read_object(fs: object, path: str) -> bytes:
    from fsspec.spec import AbstractFileSystem

    assert isinstance(fs, AbstractFileSystem)  # noqa: S101 - for the types
    info = fs.info(path)
    _check_regular(regular=info["type"] == "file")
    return bytes(fs.cat_file(path, 0, min(int(info["size"]), MAX_FILE_BYTES + 1)))


def _check_regular(*, regular: bool) -> None:
    if not regular:
        raise ImageError("is no regular file; name a PNG, JPEG or WebP file")


def decode(data: bytes) -> Image.Image:
    """The picture of a PNG, JPEG or WebP file, as 8-bit RGB, upright. Raises ImageError.

    Its header is believed before anything is unpacked. It is turned as its EXIF data says; what is transparent shows
    white; grey becomes RGB; of 16 bits the upper 8 count; colour profiles are not applied.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ImageError(_too_large(f"{picture.width}x{picture.height}"))
            # A telephone's JPEG may hold further pictures, such as a map of depths.
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                raise ImageError("is animated; give one still picture")
            with _one_large_picture if picture.width * picture.height > _LARGE_PIXELS else nullcontext():
                picture.load()
                return _as_rgb(ImageOps.exif_transpose(picture))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("is no PNG, JPEG or WebP picture; convert it to one") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large("too many")) from None
    # Pillow's decoders raise these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ImageError(f"is damaged or cut off ({reason}); make it again") from None


def _too_large(size: str) -> str:
    return f"has {size} pixels, the limit is {MAX_PIXELS:,} in all; scale it down"


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _SIXTEEN_BITS:
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode not in _EIGHT_BITS:
        raise ImageError(f"has pixels of kind {picture.mode}; save it as 8-bit RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")
