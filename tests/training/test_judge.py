"""The judge of the embedded model is right about true pictures and no better than chance about wrong labels."""

from dataclasses import replace

import numpy as np
import pytest

from training import judge, scenes
from training.scenes import Scene


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    places = list(scenes.POSITIONS)  # all five, whatever the model has learned
    drawn = [
        replace(scene, position=places[index % len(places)])
        for index, scene in enumerate(scenes.draw_scenes(scenes.all_scenes(), count, rng))
    ]
    return drawn, [judge.look(scenes.render(scene, rng)) for scene in drawn]


@pytest.fixture(scope="module")
def seen():
    return pictures(400)


@pytest.mark.parametrize("word", ["background", "colour", "shape", "position", "size"])
@pytest.mark.slow
def test_true_renders_are_recognised(seen, word):
    drawn, sightings = seen
    right = [sighting.agrees(scene)[word] for scene, sighting in zip(drawn, sightings, strict=True)]
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize(
    ("word", "choices"),
    [("background", scenes.BACKGROUNDS), ("colour", scenes.COLOURS), ("shape", scenes.SHAPES)],
)
@pytest.mark.slow
def test_wrong_labels_score_at_chance(seen, word, choices):
    drawn, sightings = seen
    shifted = drawn[1:] + drawn[:1]
    right = [sighting.agrees(scene)[word] for scene, sighting in zip(shifted, sightings, strict=True)]
    assert abs(np.mean(right) - 1 / len(choices)) < 0.08


def test_an_empty_picture_has_a_background_and_nothing_else():
    plain = np.full((256, 256, 3), scenes.BACKGROUNDS["cream"], dtype=np.uint8)
    sighting = judge.look(plain)
    assert sighting.background == "cream"
    assert sighting.shape is None
    assert sighting.colour is None


def test_a_blob_is_no_shape():
    rng = np.random.default_rng(3)
    blob = np.full((256, 256, 3), 250, dtype=np.uint8)
    for _ in range(9):  # an arm here and there, nothing that the grammar knows
        x, y = rng.integers(40, 200, 2)
        blob[y : y + 12, min(x, 128) : max(x, 128)] = (20, 20, 20)
        blob[min(y, 128) : max(y, 128), x : x + 12] = (20, 20, 20)
    assert judge.look(blob).shape is None


@pytest.mark.slow
def test_blurred_renders_are_still_recognised():
    import cv2

    rng = np.random.default_rng(5)
    drawn = scenes.draw_scenes(scenes.all_scenes(), 100, rng)
    right = [
        judge.look(cv2.GaussianBlur(scenes.render(scene, rng), (0, 0), 4.0)).shape == scene.shape for scene in drawn
    ]
    assert np.mean(right) >= 0.97


@pytest.mark.slow
def test_nearest_name_tells_pictures_apart():
    rng = np.random.default_rng(6)
    kinds = [
        Scene(shape=shape, colour=colour, background="white", position="center", size="large")
        for shape in scenes.SHAPES
        for colour in ("red", "blue", "green")
    ]
    gallery = [(f"{kind.colour} {kind.shape}", judge.icon_features(scenes.render(kind, rng))) for kind in kinds]
    found = [judge.nearest_name(scenes.render(kind, rng), gallery) for kind in kinds]
    assert found == [name for name, _ in gallery]
