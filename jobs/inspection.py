"""What picture files say of themselves: watermark, XMP, content credentials, parameters, and their row of a dataset."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from latentmill.engine import WATERMARK_METHODS, WATERMARK_MIN_PIXELS, read_watermark, watermark_bit_accuracy
from latentmill.engine.types import Pixels
from latentmill.jobs import xmp
from latentmill.jobs.credentials import Credentials, read_credentials
from latentmill.jobs.errors import JobError, UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.manifests.fields import nearest, shorten
from latentmill.jobs.outputs.publish import read_columns, standing_publication
from latentmill.jobs.store.inputs import reading
from latentmill.jobs.store.urls import allowed_filesystem, display_url
from latentmill.jobs.watermark_bits import bits_needed, matching_bits

MAX_PIXELS = 1 << 25
"""Twice the largest picture that a job can make; reading a watermark takes 20 bytes a pixel."""

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WatermarkReading:
    """`text` is what was read under the method that fitted best, damaged letters and all."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What one file says.

    `watermark` is None where the picture is too small to carry one. `c2pa` is what its content credentials say, or None
    for a format where they are not looked for. `row` is that of the dataset whose sha256 is the file's.
    """

    file: str
    sha256: str
    width: int
    height: int
    watermark: WatermarkReading | None
    digital_source_type: str | None
    parameters: str | None
    c2pa: Credentials | None
    row: Mapping[str, Any] | None = None

    @property
    def found(self) -> bool:
        """Whether the watermark that was looked for is there, beyond chance."""
        return self.watermark is not None and self.watermark.found

    @property
    def sound(self) -> bool:
        """Whether it is there, and no content credentials say that the file was changed."""
        return self.found and (self.c2pa is None or self.c2pa.state != "invalid")

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

    @property
    def sound(self) -> bool:
        """Nothing is known of it."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"found": False}


def inspect_files(
    files: Sequence[str],
    *,
    text: str,
    method: str | None = None,
    dataset: str | None = None,
    trust: str | None = None,
) -> list[Inspection | Unread]:
    """One answer per file; the watermark is read by `method` or by whichever of all fits best.

    `trust` names a file of certificates that signers may follow from. Raises UsageError if none of the files can be
    read as a picture; one among others is `Unread`. Raises JobError if there is no published dataset where one is
    named.
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
    answers: list[Inspection | Unread] = []
    for file in files:
        try:
            answers.append(_inspect(file, text, methods, trust))
        except UsageError as error:
            answers.append(Unread(file=file, error=str(error)))
    failed = [answer for answer in answers if isinstance(answer, Unread)]
    if len(failed) == len(answers):
        more = f" (nor can {len(failed) - 1:,} more)" if len(failed) > 1 else ""
        raise UsageError(failed[0].error + more)
    if dataset is None:
        return answers
    rows = _rows_of({answer.sha256 for answer in answers if isinstance(answer, Inspection)}, dataset)
    return [
        replace(answer, row=rows.get(answer.sha256)) if isinstance(answer, Inspection) else answer for answer in answers
    ]


def _inspect(file: str, text: str, methods: Sequence[str], trust: str | None) -> Inspection:
    data = _read(file)
    form, pixels, packet, parameters = _decode(file, data)
    height, width = pixels.shape[:2]
    return Inspection(
        file=file,
        sha256=hashlib.sha256(data).hexdigest(),
        width=width,
        height=height,
        watermark=None if width * height < WATERMARK_MIN_PIXELS else _read_watermark(pixels, text, methods),
        digital_source_type=None if packet is None else xmp.source_type(packet),
        parameters=parameters,
        c2pa=read_credentials(data, form, trust),
    )


def _read_watermark(pixels: Pixels, text: str, methods: Sequence[str]) -> WatermarkReading:
    accuracy, method = max((watermark_bit_accuracy(pixels, text, method), method) for method in methods)
    n_bytes = len(text.encode())
    return WatermarkReading(
        method=method,
        text=read_watermark(pixels, n_bytes, method).decode("utf-8", "replace"),
        bit_accuracy=accuracy,
        bits=8 * n_bytes,
        bits_matching=matching_bits(accuracy, 8 * n_bytes),
        bits_needed=bits_needed(8 * n_bytes) or 0,
    )


def _read(file: str) -> bytes:
    fs, inside = allowed_filesystem(file)
    with reading(display_url(file), "does not exist or is no regular file; give picture files"):
        info = fs.info(inside)
        if info["type"] != "file" or info["size"] > MAX_FILE_BYTES:
            raise UsageError(
                f"{display_url(file)} cannot be read as a picture: it is no regular file, or has more than "
                f"{MAX_FILE_BYTES:,} bytes"
            )
        data: bytes = fs.cat_file(inside)
    return data


def _decode(file: str, data: bytes) -> tuple[str, Pixels, bytes | None, str | None]:
    """The format, the pixels, the XMP packet and the parameters of a picture in any format that Pillow reads itself."""
    Image.init()
    formats = [known for known in Image.OPEN if known != "EPS"]  # which runs Ghostscript on a stranger's program
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:  # as the header says, before anything is unpacked
                raise UsageError(
                    f"{display_url(file)} has {image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,} in all; "
                    f"give the picture as it was generated"
                )
            pixels: Pixels = np.asarray(image.convert("RGB"))
            form = image.format or ""
            packet, parameters = image.info.get("xmp"), image.info.get("parameters")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{display_url(file)} cannot be read as a picture: {' '.join(str(error).split())}") from None
    return (
        form,
        pixels,
        packet if isinstance(packet, bytes) else None,
        str(parameters) if isinstance(parameters, str) else None,
    )


def _rows_of(digests: set[str], dataset: str) -> dict[str, dict[str, Any]]:
    """The rows whose pictures have these digests. Memory holds one part of the dataset at a time."""
    job = open_job(dataset)
    publication = standing_publication(job)
    if publication is None:
        raise JobError(
            f"{job.storage.url} has no whole dataset; `latentmill status {job.storage.url}` shows how far it is"
        )
    names = [name for name, _ in publication.schema]
    wanted = pa.array(sorted(digests), pa.string())
    rows: dict[str, dict[str, Any]] = {}
    for part in publication.parts:
        known = pc.is_in(read_columns(job, part, ["sha256"]).column("sha256"), value_set=wanted)
        if pc.any(known).as_py():
            for row in read_columns(job, part, names).filter(known).to_pylist():
                rows.setdefault(row["sha256"], row)
    return rows
