"""`--image-format`: what becomes of a picture, and what is recorded of it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin

from latentmill.jobs.exports.table import IMAGE_FORMATS
from tests.jobs.exports.conftest import Write
from tests.jobs.fakes import fake_pixels

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">trainedAlgorithmicMedia</x:xmpmeta>'


@pytest.mark.parametrize("image_format", list(IMAGE_FORMATS))
def test_both_digests_are_in_the_row(image_format: str, write: Write, ok: list[dict[str, Any]], tmp_path: Path):
    write("jsonl", image_format=image_format)
    lines = (tmp_path / "export/train-00000-of-00001.jsonl").read_text().splitlines()
    for row, told in zip(ok, map(json.loads, lines), strict=True):
        data = (tmp_path / "export" / told["file_name"]).read_bytes()
        assert (told["sha256"], told["pixel_sha256"]) == (row["sha256"], row["pixel_sha256"])
        assert (told["exported_sha256"], told["exported_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
        assert (told["exported_sha256"] == row["sha256"]) == (image_format == "png")
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (image_format.upper(), (64, 64))


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A PNG that says in XMP how it was made."""
    from latentmill.engine import GenerationRequest

    request = GenerationRequest(prompt="one", seed=1, width=64, height=64, num_inference_steps=1)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    buffer = io.BytesIO()
    Image.fromarray(fake_pixels(request)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_webp_without_a_quality_loses_nothing(picture: bytes):
    encode = IMAGE_FORMATS["webp"].encode
    assert np.array_equal(pixels(encode(picture, (64, 64), None)), pixels(picture))
    assert len(encode(picture, (64, 64), 30)) < len(encode(picture, (64, 64), None))


@pytest.mark.parametrize(("image_format", "quality"), [("webp", 90), ("jpeg", None), ("jpeg", 90)])
def test_a_quality_says_how_much_is_lost(image_format: str, quality: int | None, picture: bytes):
    encode = IMAGE_FORMATS[image_format].encode

    def loss(given: int | None) -> float:
        return float(np.abs(pixels(encode(picture, (64, 64), given)) - pixels(picture)).mean())

    assert 0 < loss(quality) < loss(10)


@pytest.mark.parametrize("image_format", list(IMAGE_FORMATS))
def test_what_says_that_a_picture_is_synthetic_goes_along(image_format: str, picture: bytes):
    data = IMAGE_FORMATS[image_format].encode(picture, (64, 64), None)
    with Image.open(io.BytesIO(data)) as image:
        xmp = image.info["xmp"]
    assert (xmp.encode() if isinstance(xmp, str) else xmp) == XMP


def test_a_picture_of_another_size_is_refused_before_it_is_unpacked(picture: bytes):
    with pytest.raises(ValueError, match="its size is 64x64, not 32x32"):
        IMAGE_FORMATS["webp"].encode(picture, (32, 32), None)


def test_the_parameters_stay_in_png_only(write: Write, tmp_path: Path):
    for image_format in IMAGE_FORMATS:
        write("jsonl", tmp_path / image_format, image_format=image_format, filter="prompt == 'seven'")
        (file,) = (tmp_path / image_format / "images").rglob("*.*")
        with Image.open(file) as image:
            assert ("parameters" in image.info) == (image_format == "png")
        assert (b"Steps: 2" in file.read_bytes()) == (image_format == "png")


def test_jpeg_has_its_colours_in_full_resolution_and_the_quality_95(picture: bytes):
    encode = IMAGE_FORMATS["jpeg"].encode
    with Image.open(io.BytesIO(encode(picture, (64, 64), None))) as image:
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
    assert encode(picture, (64, 64), None) == encode(picture, (64, 64), 95) != encode(picture, (64, 64), 94)
