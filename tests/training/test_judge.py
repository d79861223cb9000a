"""The judge of the embedded model is right about true pictures and no better than chance about wrong labels."""

from dataclasses import replace

import numpy as np
import pytest

from training import edges, judge, pairs, scenes
from training.scenes import Scene

pytestmark = pytest.mark.long


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = scenes.draw_scenes(scenes.all_scenes(), count, rng)
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


def pair_marks(count, change=lambda pair: pair):
    rng = np.random.default_rng(8)
    drawn = pairs.draw_pairs(count, rng, held_out=True)
    marks = [judge.look_at_pair(pairs.render(pair, rng), change(pair)) for pair in drawn]
    return {word: float(np.mean([mark[word] for mark in marks])) for word in judge.PAIR_WORDS}


@pytest.mark.slow
def test_true_pairs_are_recognised_in_either_order_of_words():
    assert min(pair_marks(100).values()) >= 0.99
    assert min(pair_marks(100, lambda pair: pair.reverse).values()) >= 0.99


def test_the_opposite_relation_is_wrong_and_all_else_right():
    marks = pair_marks(30, lambda pair: replace(pair, relation=pair.reverse.relation))
    assert marks.pop("relation") == 0
    assert min(marks.values()) == 1


def test_one_object_is_no_pair():
    (pair,) = pairs.draw_pairs(1, np.random.default_rng(1), held_out=True)
    scene = scenes.Scene(
        shape=pair.first.shape, colour=pair.first.colour, background=pair.background, position="left", size="small"
    )
    marks = judge.look_at_pair(scenes.render(scene, np.random.default_rng(2)), pair)
    assert marks == {"background": True, "colours": False, "shapes": False, "relation": False}


def test_edges_of_true_renders_are_true_and_crisp():
    rng = np.random.default_rng(9)
    drawn = scenes.draw_scenes(scenes.all_scenes(), 8, rng)
    rendered = [scenes.render(scene, rng) for scene in drawn]
    assert min(edges.scene_score(picture, scene.shape) for picture, scene in zip(rendered, drawn, strict=True)) > 0.99
    assert max(edges.width(picture) for picture in rendered) < 1.6


def test_wavy_edges_and_other_shapes_are_no_true_edges_and_soft_ones_are_wide():
    import cv2

    scene = scenes.Scene(shape="square", colour="red", background="white", position="center", size="large")
    picture = scenes.render(scene, np.random.default_rng(0))
    x, y = np.meshgrid(np.arange(256, dtype=np.float32), np.arange(256, dtype=np.float32))
    wavy = cv2.remap(picture, x + 6 * np.sin(y / 5), y + 6 * np.sin(x / 5), cv2.INTER_LINEAR)
    assert edges.scene_score(wavy, "square") < 0.8
    assert edges.scene_score(picture, "star") < 0.6
    assert edges.width(cv2.GaussianBlur(picture, (0, 0), 3.0)) > 4


def test_an_empty_picture_has_no_edges():
    plain = np.full((256, 256, 3), 250, dtype=np.uint8)
    assert edges.scene_score(plain, "circle") == 0
    assert np.isnan(edges.width(plain))
