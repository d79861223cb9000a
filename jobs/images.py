"""Pixels to PNG bytes and back; the same pixels and text always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import re

import numpy as np
from PIL import Image, PngImagePlugin

from engine import GenerationRequest
from engine.types import Pixels

TEXT_LIMIT = 16_384
"""Bytes of text in one picture: Pillow writes more, but refuses to read much more back."""

_SAMPLER_NAMES = {"ddim": "DDIM", "plms": "PLMS"}
_SURROGATES = re.compile("[\ud800-\udfff]")
_COMPRESSION = 6


def encode_png(pixels: Pixels, parameters: str | None = None) -> bytes:
    """`(h, w, 3) uint8` RGB as a PNG, with `parameters` as its text chunk of that name."""
    text = PngImagePlugin.PngInfo()
    if parameters is not None:
        text.add_text("parameters", parameters)  # tEXt for Latin-1, iTXt (UTF-8) for everything else
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_COMPRESSION, pnginfo=text)
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """The pixels of a PNG as `(h, w, 3) uint8` RGB. Raises ValueError for anything else."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
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


def parameters_text(request: GenerationRequest, *, model_name: str, model_hash: str, version: str) -> str:
    """The request in the words of the `parameters` chunk that picture viewers and web UIs read.

    The last line holds the settings and is never cut; prompts are cut so that all stays within TEXT_LIMIT bytes.
    """
    settings = {
        "Steps": str(request.num_inference_steps),
        "Sampler": _SAMPLER_NAMES.get(request.sampler, request.sampler),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": str(request.seed),
        "Size": f"{request.width}x{request.height}",
        "Model hash": model_hash,
        "Model": model_name,
        "Version": version,
    }
    if request.eta:
        settings["Eta"] = f"{request.eta:g}"
    last = ", ".join(f"{key}: {_quote(_clean(value))}" for key, value in settings.items())
    head = "\nNegative prompt: "
    room = TEXT_LIMIT - len(last.encode()) - len(head) - 1
    negative = _clean(request.negative_prompt)
    prompt = _cut(_clean(request.prompt), room - min(len(negative.encode()), room // 2))
    negative = _cut(negative, room - len(prompt.encode()))
    return f"{prompt}{head + negative if negative else ''}\n{last}"


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _clean(text: str) -> str:
    """PNG text can hold neither NUL nor lone surrogates."""
    return _SURROGATES.sub("\ufffd", text.replace("\0", "\ufffd"))


def _cut(text: str, limit: int) -> str:
    data = text.encode()
    return text if len(data) <= limit else data[: max(0, limit - 3)].decode(errors="ignore") + "…"
