"""The watermark that is read back: how much of it is evidence, and what a job does with a picture that lacks it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from imwatermark import WatermarkEncoder
from PIL import Image

from latentmill.engine import embed_watermark
from latentmill.jobs import postprocess
from latentmill.jobs.errors import UsageError
from latentmill.jobs.inspection import Inspection, WatermarkReading, inspect_files
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.pictures import decode_png
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.watermark_bits import CHANCE, bits_needed
from latentmill.jobs.worker import ChunkGenerator, GeneratedChunk, postprocess_chunk
from tests.jobs.driver import job_spec
from tests.jobs.fakes import FakeEngine, fake_engine

TEXT = "StableDiffusionV1"


def chance_of(k: int, n: int) -> float:
    return sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n


def test_the_bound_is_the_smallest_that_chance_rarely_reaches() -> None:
    assert bits_needed(136) == 96
    assert bits_needed(8) is bits_needed(16) is None
    for n in (24, 40, 136, 256):
        k = bits_needed(n)
        assert k is not None
        assert chance_of(k, n) <= 1 / CHANCE
        assert k == n or chance_of(k - 1, n) > 1 / CHANCE


def read_mark(file: Path, *, text: str = TEXT, method: str | None = None) -> WatermarkReading:
    (answer,) = inspect_files([str(file)], text=text, method=method)
    assert isinstance(answer, Inspection)
    assert answer.watermark is not None
    return answer.watermark


def soft_picture(seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("method", ["dwtDct", "dwtDctSvd"])
def test_marks_of_the_library_itself_are_read(tmp_path: Path, method: str) -> None:
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", TEXT.encode())
    cv2.imwrite(str(tmp_path / "theirs.png"), encoder.encode(soft_picture()[:, :, ::-1].copy(), method))
    reading = read_mark(tmp_path / "theirs.png")
    assert reading.found
    assert reading.bits_needed == 96 <= reading.bits_matching
    other = read_mark(tmp_path / "theirs.png", text="another text 17 b", method=method)
    assert not other.found


def test_a_damaged_mark_is_found_up_to_the_bound(tmp_path: Path) -> None:
    marked = Image.fromarray(embed_watermark(soft_picture(), TEXT, "dwtDctSvd"))
    marked.save(tmp_path / "a.jpg", quality=80)
    reading = read_mark(tmp_path / "a.jpg")
    assert reading.found
    assert reading.bit_accuracy < 1
    with pytest.raises(UsageError, match=r"'ab'.* too few bits to be told from chance"):
        read_mark(tmp_path / "a.jpg", text="ab")


def flat_engine(plan: Any, device: str) -> FakeEngine:
    """Flat pictures, where dwtDct does not hold."""
    engine = fake_engine(plan, device)
    original = engine._result

    def flat(request: Any, slot: int) -> Any:
        result = original(request, slot)
        if "flat" in request.prompt:
            result.pixels[:] = 250
        return result

    engine._result = flat  # type: ignore[method-assign]
    return engine


@pytest.fixture
def rows(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The rows of a job of one chunk: a soft picture, a flat one, and a flagged one that is blanked."""

    def run(prompts: list[str], **settings: Any) -> list[dict[str, Any]]:
        out = str(tmp_path / "out")
        sizes = {"width": 256, "height": 256, "chunk_size": 8}
        with draft_plan(job_spec(tiny_model, manifest(prompts), out, **sizes, **settings)) as draft:
            adopt(draft, Storage.open(out))
        job = open_job(out)
        generated = ChunkGenerator(job, engine_factory=flat_engine).generate(0)
        assert isinstance(generated, GeneratedChunk)
        postprocess_chunk(job, generated)
        record = job.ledger.read(0)
        assert record is not None
        return record.table.to_pylist()

    return run


def test_a_watermark_that_cannot_be_read_back_is_recorded_refused_or_made_again(rows: Any, tmp_path: Path) -> None:
    seen = {}
    for policy in ("record", "require", "retry"):
        seen[policy] = rows(["flat", "flat nsfw"], watermark="dwtDct", watermark_policy=policy)
        (tmp_path / "out").rename(tmp_path / policy)
    flat, blanked = seen["record"]
    assert (flat["status"], flat["watermark"]) == ("ok", "dwtDct")
    assert flat["watermark_bit_accuracy"] < 96 / 136
    assert (blanked["status"], blanked["watermark"]) == ("flagged", "dwtDct")
    flat, blanked = seen["require"]
    assert (flat["status"], flat["image"], flat["watermark"]) == ("failed", None, None)
    assert flat["error"].startswith("the watermark cannot be read back: dwtDct ")
    assert flat["error"].endswith(" of 136 bits, 96 are needed")
    assert (blanked["status"], blanked["image"] is None) == ("flagged", False), "a blank picture needs no watermark"
    flat, _ = seen["retry"]
    assert (flat["status"], flat["watermark"]) == ("ok", "dwtDctSvd")
    assert flat["watermark_bit_accuracy"] >= 96 / 136
    pixels = decode_png((tmp_path / "retry" / flat["image"]).read_bytes())
    Image.fromarray(pixels).save(tmp_path / "kept.png")
    reading = read_mark(tmp_path / "kept.png", method="dwtDctSvd")
    assert reading.found


def test_if_no_method_holds_the_sample_fails_and_says_both(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentmill import engine

    monkeypatch.setattr(engine, "watermark_bit_accuracy", lambda *_: 95 / 136, raising=False)
    (row,) = rows(["flat"], watermark="dwtDct", watermark_policy="retry")
    assert row["status"] == "failed"
    methods = f"dwtDct 95, {postprocess.RETRY_METHOD} 95"
    assert row["error"] == f"the watermark cannot be read back: {methods} of 136 bits, 96 are needed"
