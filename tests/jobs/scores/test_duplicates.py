"""Near duplicates are those that comparing all with all finds, and the work is bounded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from latentmill.jobs.outputs.score import score
from latentmill.jobs.scores.duplicates import MAX_PAIRS, find_duplicates
from latentmill.jobs.scores.phash import perceptual_hash
from latentmill.jobs.scores.spec import ScoreSpec
from tests.jobs.driver import job_spec, run


def families(seed: int, count: int = 40) -> list[str]:
    """Hashes of a few families: each a hash, copies of it, and copies with up to six bits flipped."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        base = int(random.integers(0, 1 << 63))
        for _ in range(int(random.integers(1, 6))):
            flips = random.choice(64, int(random.integers(0, 7)), replace=False)
            found.append(base ^ sum(1 << int(bit) for bit in flips))
    return [f"{value:016x}" for value in random.permutation(np.array(found, dtype=np.uint64)).tolist()]


def all_with_all(sample_ids: list[str], digits: list[str], distance: int) -> set[tuple[str, str, int]]:
    first: dict[str, str] = {}
    pairs = set()
    for sample, hash_ in zip(sample_ids, digits, strict=True):
        if hash_ in first:
            pairs.add((first[hash_], sample, 0))
        first.setdefault(hash_, sample)
    for (one, a), (two, b) in itertools.combinations(first.items(), 2):
        bits = bin(int(one, 16) ^ int(two, 16)).count("1")
        if bits <= distance:
            pairs.add((min(a, b), max(a, b), bits))
    return pairs


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 8, 16])
def test_the_pairs_are_those_that_comparing_all_with_all_finds(distance: int):
    for seed in range(5):
        digits = families(seed)
        samples = [f"{number:08d}" for number in range(len(digits))]
        found = find_duplicates(samples, digits, distance)
        expected = all_with_all(samples, digits, distance)
        assert len(expected) > 0
        assert [(pair.distance, pair.first, pair.second) for pair in found.pairs] == sorted(
            (c, a, b) for a, b, c in expected
        )
        assert (found.total, found.pictures, found.not_compared) == (len(expected), len(digits), None)


def test_many_equal_pictures_make_one_pair_each_and_a_list_of_bounded_length():
    digits = ["0" * 16] * 50_000 + ["f" * 16]
    found = find_duplicates([f"{number:08d}" for number in range(len(digits))], digits, 4)
    assert found.total == 49_999
    assert len(found.pairs) == MAX_PAIRS
    assert (found.pairs[0].first, found.pairs[-1].second) == ("00000000", f"{MAX_PAIRS:08d}")


def test_more_comparisons_than_the_limit_are_not_made_and_told():
    digits = [f"{number:016x}" for number in range(2000)]  # all of them share most bands
    samples = [f"{number:08d}" for number in range(2000)]
    found = find_duplicates([*samples, "00002000"], [*digits, digits[7]], 4, most=10_000)
    assert "the limit is 10,000; ask for a smaller distance" in str(found.not_compared)
    assert [(pair.first, pair.second) for pair in found.pairs] == [("00000007", "00002000")]
    assert find_duplicates(samples, digits, 0, most=0).not_compared is None


def test_nothing_and_what_is_no_hash():
    assert find_duplicates([], [], 4).pairs == ()
    with pytest.raises(ValueError, match="'12' is no hash"):
        find_duplicates(["0"], ["12"], 4)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows * a + columns * b) for a, b in random.uniform(-0.2, 0.2, (3, 2))]
    return (127 + 127 * np.stack(waves, axis=2)).astype(np.uint8)


def test_the_hash_is_that_of_imagehash_and_survives_what_eyes_do_not_see():
    """The digits are those of imagehash 4.3.2 with Pillow 13, which agreed on 303 pictures in all."""
    seen = picture(1, 256, 192)
    known = {"wave": perceptual_hash(seen), "white": perceptual_hash(np.full((64, 64, 3), 255, np.uint8))}
    assert known == {"wave": "bb9a149a159f156a", "white": "8000000000000000"}
    noise = np.random.default_rng(0).integers(-3, 4, seen.shape)
    noisy = (seen.astype(int) + noise).clip(0, 255).astype(np.uint8)
    copies = [noisy, cv2.resize(seen, (96, 128), interpolation=cv2.INTER_AREA), cv2.convertScaleAbs(seen, alpha=0.9)]
    others = [picture(seed, 256, 192) for seed in range(2, 12)]
    assert max(apart(perceptual_hash(copy), known["wave"]) for copy in copies) < 10
    assert min(apart(perceptual_hash(other), known["wave"]) for other in others) > 16


def apart(one: str, two: str) -> int:
    return bin(int(one, 16) ^ int(two, 16)).count("1")


def test_near_duplicates_of_a_dataset_are_told(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path):
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(["one", "two", "one nsfw", "two nsfw"]), out, seed=1))
    (scorer,) = score(out, ["phash"], ScoreSpec(distance=16)).scorers
    assert scorer.duplicates is not None
    assert scorer.duplicates.pictures == scorer.scored == 2, "blank pictures are no duplicates of one another"
    (again,) = score(out, ["phash"], ScoreSpec(distance=16)).scorers
    assert (again.written, again.duplicates) == (0, scorer.duplicates)
