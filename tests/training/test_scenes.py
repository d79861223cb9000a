"""The scenes' grammar: closed, split by a fixed rule, drawn where the caption says."""

import numpy as np
import pytest

from training import pairs, scenes


def test_the_split_is_fixed_and_covers_every_word():
    held_out, training = scenes.split(held_out=True), scenes.split(held_out=False)
    assert len(held_out) + len(training) == len(scenes.all_scenes())
    assert not set(held_out) & set(training)
    assert 0.05 < len(held_out) / len(scenes.all_scenes()) < 0.15
    for word in ("shape", "colour", "background", "position", "size"):
        every = {getattr(scene, word) for scene in scenes.all_scenes()}
        assert {getattr(scene, word) for scene in held_out} == every
        assert {getattr(scene, word) for scene in training} == every


def test_no_scene_hides_its_object():
    pairs = {(scene.colour, scene.background) for scene in scenes.all_scenes()}
    assert not pairs & scenes.INVISIBLE


def test_the_plain_caption_names_everything():
    for scene in scenes.all_scenes()[::37]:
        text = scenes.caption(scene)
        for word in (scene.shape, scene.colour, scene.background, scene.position, scene.size):
            assert word in text


def test_captions_vary_and_never_lie():
    rng = np.random.default_rng(0)
    scene = scenes.all_scenes()[100]
    texts = {scenes.caption(scene, rng) for _ in range(100)}
    assert len(texts) == 5
    assert all(scene.colour in text and scene.shape in text and scene.background in text for text in texts)


def test_the_same_generator_draws_the_same_picture():
    scene = scenes.all_scenes()[7]
    one, two = (scenes.render(scene, np.random.default_rng(3)) for _ in range(2))
    assert one.shape == (256, 256, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, two)


@pytest.mark.parametrize("size", scenes.SIZES)
@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("position", scenes.POSITIONS)
def test_objects_stay_inside_and_are_large_enough(shape, position, size):
    scene = scenes.Scene(shape=shape, colour="red", background="white", position=position, size=size)
    picture = scenes.render(scene, np.random.default_rng(1)).astype(int)
    drawn = np.abs(picture - picture[0, 0]).sum(axis=2) > 60
    assert not drawn[:3].any()
    assert not drawn[-3:].any()
    assert not drawn[:, :3].any()
    assert not drawn[:, -3:].any()
    height, width = np.ptp(np.flatnonzero(drawn.any(axis=1))), np.ptp(np.flatnonzero(drawn.any(axis=0)))
    assert max(height, width) >= 90


def test_no_pair_is_trained_on_that_the_evaluation_shows_in_other_words():
    drawn = pairs.draw_pairs(300, np.random.default_rng(0), held_out=False)
    assert not any(pair.held_out or pair.reverse.held_out for pair in drawn)
    share = np.mean([pair.held_out for pair in (pairs._draw(np.random.default_rng(seed)) for seed in range(600))])
    assert 0.05 < share < 0.16


def test_the_reverse_of_a_pair_says_the_same():
    (pair,) = pairs.draw_pairs(1, np.random.default_rng(4), held_out=False)
    assert pair.reverse.reverse == pair
    assert pair.reverse.first == pair.second
    one, two = (pairs.caption(each) for each in (pair, pair.reverse))
    assert sorted(one.split()) != sorted(two.split()) or pair.relation == pair.reverse.relation


def test_the_first_object_lies_where_the_relation_says():
    for relation, (x, y) in pairs.RELATIONS.items():
        pair = pairs.Pair(
            first=pairs.Thing(shape="circle", colour="red"), second=pairs.Thing(shape="square", colour="blue"),
            relation=relation, background="white",
        )  # fmt: skip
        picture = pairs.render(pair, np.random.default_rng(0)).astype(int)
        red, blue = picture[..., 0] - picture[..., 2] > 80, picture[..., 2] - picture[..., 0] > 80
        down, across = np.argwhere(red).mean(axis=0) - np.argwhere(blue).mean(axis=0)
        assert abs(across - 2 * pairs.DISTANCE * x) < 20
        assert abs(down - 2 * pairs.DISTANCE * y) < 20
