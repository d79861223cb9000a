"""The mark is the library's own, both ways; the checker's weights are real."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from imwatermark import WatermarkDecoder, WatermarkEncoder

from latentmill.engine import EngineError, ModelSpec, embed_watermark, read_watermark, watermark_bit_accuracy
from latentmill.engine.guards.open_nsfw import OpenNsfw
from latentmill.engine.guards.safety import load_safety_checker

pytestmark = pytest.mark.slow

TEXT = "StableDiffusionV1"


def photograph(seed: int = 0, height: int = 256, width: int = 320) -> np.ndarray:
    """A picture with texture at every scale, which both methods can mark."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cell in (4, 8, 16, 32, 64):
        coarse = rng.normal(size=(height // cell + 1, width // cell + 1, 3))
        total += np.kron(coarse, np.ones((cell, cell, 1)))[:height, :width] * cell**0.5
    total -= total.min()
    return (total / total.max() * 200 + 25).astype(np.uint8)


@pytest.mark.parametrize("method", ["dwtDct", "dwtDctSvd"])
def test_ours_is_read_by_the_library_and_the_librarys_by_us(method):
    picture = photograph()
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", TEXT.encode())
    theirs = encoder.encode(picture[:, :, ::-1].copy(), method)[:, :, ::-1]
    ours = embed_watermark(picture, TEXT, method)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, picture)
    decoded = WatermarkDecoder("bytes", 136).decode(ours[:, :, ::-1].copy(), method)
    assert decoded == read_watermark(np.ascontiguousarray(theirs), len(TEXT), method)
    assert watermark_bit_accuracy(ours, TEXT, method) >= 96 / 136


def corpus(height: int, width: int) -> dict[str, np.ndarray]:
    """Pictures that are hard on a transform: smooth, flat, saturated, and noise."""
    rng = np.random.default_rng(height * width)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    cells = np.kron(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)), np.ones((16, 16, 1)))
    return {
        "noise": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "photograph": photograph(3, height, width),
        "black": np.zeros((height, width, 3), np.uint8),
        "white": np.full((height, width, 3), 255, np.uint8),
        "flat": np.full((height, width, 3), (200, 13, 77), np.uint8),
        "ramp": ramp.astype(np.uint8),
        "cells": cells[:height, :width].astype(np.uint8),
        "saturated": (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8),
    }


@pytest.mark.parametrize("method", ["dwtDct", "dwtDctSvd"])
@pytest.mark.parametrize("text", [TEXT, "a", "é", "x" * 32])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (257, 259), (1030, 67)])
def test_every_bit_is_the_librarys_whatever_the_picture_the_text_and_the_size(height, width, text, method):
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", text.encode())
    n_bytes = len(text.encode())
    for name, picture in corpus(height, width).items():
        theirs = encoder.encode(picture[:, :, ::-1].copy(), method)[:, :, ::-1]
        assert np.array_equal(embed_watermark(picture, text, method), theirs), name
        for marked in (theirs, picture):
            decoded = WatermarkDecoder("bytes", 8 * n_bytes).decode(marked[:, :, ::-1].copy(), method)
            assert read_watermark(np.ascontiguousarray(marked), n_bytes, method) == decoded, name


def test_nearly_all_blocks_take_the_short_way():
    from latentmill.engine.guards.watermark import _blocks, _colour_plane, _cosine, _greatest_singular_values, _low_band

    blocks = _blocks(_low_band(_colour_plane(cv2.cvtColor(photograph(), cv2.COLOR_RGB2YUV))))
    values, _, sure = _greatest_singular_values(_cosine(blocks))
    assert sure.mean() > 0.99
    expected = np.linalg.svd(_cosine(blocks), compute_uv=False)[:, 0]
    assert np.allclose(values[sure], expected[sure], rtol=1e-12)


@pytest.mark.parametrize(("limit", "value"), [("_RESIDUAL", 0.0), ("_NEARLY", 18.0), ("_EDGE", 0.6), ("_EDGE", 0.01)])
def test_blocks_that_must_be_exact_are_the_librarys_too(limit, value, monkeypatch):
    """Each limit in turn sends all blocks, or a part of them, the long way."""
    from latentmill.engine.guards import watermark

    taken = []
    svd = watermark._mark_by_svd
    monkeypatch.setattr(watermark, limit, value)
    monkeypatch.setattr(watermark, "_mark_by_svd", lambda blocks, bits: taken.append(len(blocks)) or svd(blocks, bits))
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", TEXT.encode())
    for name, picture in corpus(257, 259).items():
        theirs = encoder.encode(picture[:, :, ::-1].copy(), "dwtDctSvd")[:, :, ::-1]
        assert np.array_equal(embed_watermark(picture, TEXT, "dwtDctSvd"), theirs), name
        decoded = WatermarkDecoder("bytes", 136).decode(theirs[:, :, ::-1].copy(), "dwtDctSvd")
        assert read_watermark(np.ascontiguousarray(theirs), len(TEXT), "dwtDctSvd") == decoded, name
    assert sum(taken) > 500


def test_marking_needs_neither_torch_nor_the_library():
    script = "import sys, latentmill.engine.guards.watermark; print({'torch', 'imwatermark'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_job_default_reads_back_exactly_and_an_unmarked_picture_does_not():
    picture = photograph(1)
    marked = embed_watermark(picture, TEXT, "dwtDctSvd")
    assert read_watermark(marked, len(TEXT), "dwtDctSvd") == TEXT.encode()
    assert watermark_bit_accuracy(marked, TEXT, "dwtDctSvd") == 1.0
    assert watermark_bit_accuracy(picture, TEXT, "dwtDctSvd") < 96 / 136
    assert np.abs(marked.astype(int) - picture.astype(int)).mean() < 6


def test_marking_does_not_change_the_picture_it_was_given():
    picture = photograph(2)
    copy = picture.copy()
    embed_watermark(picture, TEXT, "dwtDct")
    assert np.array_equal(picture, copy)


def test_too_small_a_picture_is_refused_not_skipped():
    with pytest.raises(EngineError, match="200x256 is too small for the watermark, which needs 65536 pixels"):
        embed_watermark(photograph(height=256, width=200), TEXT, "dwtDct")


def test_an_unknown_method_is_refused():
    with pytest.raises(EngineError, match="'rivaGan'; there are dwtDct, dwtDctSvd"):
        embed_watermark(photograph(), TEXT, "rivaGan")


def test_open_nsfw_scores_with_its_real_weights_and_obeys_the_threshold():
    picture = photograph()
    verdict = OpenNsfw(threshold=0.8, threads=1).check(picture)
    assert verdict.checker == "open-nsfw"
    assert 0 < verdict.score < 0.8
    assert not verdict.flagged
    assert OpenNsfw(threshold=verdict.score, threads=1).check(picture).flagged


def test_a_score_that_is_not_a_number_is_flagged(monkeypatch):
    checker = OpenNsfw(threshold=0.8, threads=1)

    class Broken:
        nsfw = float("nan")

    monkeypatch.setattr(checker._classifier, "classify", lambda image: Broken())
    assert checker.check(photograph()).flagged


def test_no_checker_only_by_explicit_choice(eps_model):
    cpu = torch.device("cpu")
    verdict = load_safety_checker(ModelSpec(model=str(eps_model), safety="none"), eps_model, cpu).check(photograph())
    assert (verdict.checker, verdict.score, verdict.flagged) == ("none", None, False)
    assert isinstance(load_safety_checker(ModelSpec(model=str(eps_model)), eps_model, cpu), OpenNsfw)
    with pytest.raises(EngineError, match="expected one of auto, open-nsfw, clip-concepts, none"):
        load_safety_checker(ModelSpec(model=str(eps_model), safety="off"), eps_model, cpu)
    with pytest.raises(EngineError, match="has no safety_checker folder"):
        load_safety_checker(ModelSpec(model=str(eps_model), safety="clip-concepts"), eps_model, cpu)
