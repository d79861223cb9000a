"""The distances of two pictures against their definitions, written out."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from latentmill.jobs.compare.distance import distance, ssim


def noise(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ssim_by_its_definition(one: np.ndarray, other: np.ndarray) -> float:
    """Equation 13 of the paper, window by window."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            for colour in range(3):
                x = one[top : top + 11, left : left + 11, colour].astype(float)
                y = other[top : top + 11, left : left + 11, colour].astype(float)
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_structural_similarity_is_that_of_the_paper():
    one, other = noise(1), cv2.GaussianBlur(noise(1), (5, 5), 1.0)
    assert ssim(one, other) == pytest.approx(ssim_by_its_definition(one, other), abs=1e-9)
    assert 0.05 < ssim(one, other) < 0.95


def test_the_same_picture_is_at_distance_zero_exactly_and_order_does_not_count():
    one, other = noise(1), noise(2)
    same = distance(one, one.copy())
    assert (same.pixel, same.greatest, same.perceptual) == (0, 0, 0)
    assert distance(one, other) == distance(other, one)


def test_pixel_distances_are_the_mean_and_the_greatest_difference():
    one = np.full((16, 16, 3), 100, np.uint8)
    other = one.copy()
    other[0, 0] = (255, 0, 100)
    found = distance(one, other)
    assert (found.pixel, found.greatest) == (pytest.approx((155 + 100) / (16 * 16 * 3)), 155)


def test_what_is_seen_less_is_nearer():
    picture = cv2.GaussianBlur(noise(3, 96, 96), (9, 9), 3)
    off_by_one = picture.copy()
    off_by_one[::2] += 1
    blurred = cv2.GaussianBlur(picture, (9, 9), 3)
    found = [distance(picture, other).perceptual for other in (off_by_one, blurred, noise(4, 96, 96))]
    assert 0 < found[0] < 0.05 < found[1] < found[2]


@pytest.mark.parametrize("size", [(8, 8), (11, 40), (1024, 512), (700, 900)])
def test_pictures_of_any_size_have_a_distance(size: tuple[int, int]):
    found = distance(noise(1, *size), noise(2, *size))
    assert 0.5 < found.perceptual < 2
