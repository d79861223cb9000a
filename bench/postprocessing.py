"""What a picture costs after it is generated, in CPU time of one thread: the mark, its reading, the PNG, the digest."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bench.figures import figure, interleaved, ratio
from bench.synthetic import job_spec, write_manifest
from bench.table import Context, Measured
from latentmill.engine import GenerationResult, SafetyVerdict, embed_watermark, watermark_bit_accuracy
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.pictures import encode_png, pixel_sha256
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.postprocess import postprocess_sample
from latentmill.jobs.store.storage import Storage

MARK, METHOD = "StableDiffusionV1", "dwtDctSvd"

Pixels = NDArray[np.uint8]


def photo_like(side: int, seed: int) -> Pixels:
    """Soft shapes with grain: its PNG is about as large as a generated photograph's (some 1.5 bytes a pixel)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 236, (8, 8, 3)).astype(np.float32)
    soft = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 4, (side, side, 1)) + rng.normal(0, 1, (side, side, 3))
    return np.asarray((soft + grain).clip(0, 255), np.uint8)


def per_picture(context: Context) -> Measured:
    """Each step by itself, all of it as the job does it, and the libraries that the plain scripts use."""
    cv2.setNumThreads(1)
    measured = Measured(notes=["CPU time of one thread, each value the mean of several pictures"])
    for side in (256,) if context.tiny else (256, 512, 1024):
        _at(measured, context, side)
    return measured


def _at(measured: Measured, context: Context, side: int) -> None:
    count = 2 if context.tiny else max(2, 4 * 512 // side)
    pictures = [photo_like(side, seed) for seed in range(count)]
    marked = [embed_watermark(picture, MARK, METHOD) for picture in pictures]
    steps: dict[str, Callable[[int], Any]] = {
        "all": _whole(context, side, pictures),
        "mark": lambda n: embed_watermark(pictures[n], MARK, METHOD),
        "read back": lambda n: watermark_bit_accuracy(marked[n], MARK, METHOD),
        "PNG": lambda n: encode_png(marked[n], "a prompt"),
        "digest of pixels": lambda n: pixel_sha256(marked[n]),
        **_libraries(pictures, marked),
    }

    def timed(work: Callable[[int], Any]) -> Callable[[], float]:
        def seconds() -> float:
            began = time.process_time()
            for number in range(count):
                work(number)
            return 1000 * (time.process_time() - began) / count

        return seconds

    for work in steps.values():
        work(0)
    found = interleaved({name: timed(work) for name, work in steps.items()}, context.rounds)
    measured.figures += [figure(f"{side} px: {name}", "ms", values) for name, values in found.items()]
    for step in ("mark", "read back", "PNG"):
        measured.figures.append(ratio(f"{side} px: {step}, library / ours", found[f"{step}, library"], found[step]))
    ours, library = (np.mean([len(encode(each)) for each in marked]) for encode in (encode_png, _pillow))
    measured.notes.append(f"{side} px: a PNG of ours has {ours:,.0f} bytes, of Pillow's at its default {library:,.0f}")
    assert np.array_equal(_library_mark(pictures[0]), marked[0]), "the library's mark is another one"


def _whole(context: Context, side: int, pictures: list[Pixels]) -> Callable[[int], Any]:
    """`postprocess_sample` for a job of this size."""
    out = context.folder / f"job{side}"
    manifest = write_manifest(context.folder / f"{side}.parquet", len(pictures))
    settings = {"width": side, "height": side, "watermark": METHOD, "watermark_text": MARK}
    with draft_plan(job_spec(manifest, out, **settings)) as draft:
        adopt(draft, Storage.open(str(out)))
    plan = open_job(str(out)).plan
    samples = plan.samples_of_chunk(0)

    def work(number: int) -> None:
        result = GenerationResult(
            pixels=pictures[number],
            error=None,
            safety=SafetyVerdict(checker="none", score=0.0, flagged=False),
            prompt_tokens=12,
            precision="fp32",
            batch_size=plan.batch_size,
            batch_slot=0,
        )
        processed = postprocess_sample(plan, samples[number], result, "bench")
        assert processed.data is not None, processed.row["error"]

    return work


def _libraries(pictures: list[Pixels], marked: list[Pixels]) -> dict[str, Callable[[int], Any]]:
    from imwatermark import WatermarkDecoder

    decoder = WatermarkDecoder("bytes", 8 * len(MARK))
    turned = [cv2.cvtColor(each, cv2.COLOR_RGB2BGR) for each in marked]
    return {
        "mark, library": lambda n: _library_mark(pictures[n]),
        "read back, library": lambda n: decoder.decode(turned[n], METHOD),
        "PNG, library": lambda n: _pillow(marked[n]),
    }


def _library_mark(pixels: Pixels) -> Pixels:
    from imwatermark import WatermarkEncoder

    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", MARK.encode())
    return np.asarray(
        cv2.cvtColor(encoder.encode(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), METHOD), cv2.COLOR_BGR2RGB), np.uint8
    )


def _pillow(pixels: Pixels) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
