"""Sweep axes: ranges, lists, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job_file import resolve
from latentmill.jobs.manifests.axes import build_axes, build_dimensions, count_combinations, joined_axis, parse_axis


def axes_of(*flags):
    return build_axes(dict(parse_axis(flag) for flag in flags))


def test_values_have_their_parameters_type_and_order():
    guidance, seed, sampler = axes_of("guidance_scale=7.5,3,5", "seed=0:4", "sampler=plms,ddim")
    assert guidance.values == (7.5, 3.0, 5.0)
    assert all(isinstance(value, float) for value in guidance.values)
    assert seed.values == (0, 1, 2, 3)
    assert sampler.values == ("plms", "ddim")
    assert count_combinations(build_dimensions((guidance, seed, sampler), ())) == 24
    assert count_combinations(()) == 1


@pytest.mark.parametrize(
    ("text", "values"),
    [("10:40:10", (10, 20, 30)), ("30:0:-10", (30, 20, 10)), ("5,1:3", (5, 1, 2)), ("num-inference-steps", None)],
)
def test_ranges_are_half_open(text, values):
    if values is None:
        assert parse_axis("num-inference-steps=1")[0] == "num_inference_steps"
    else:
        assert axes_of(f"num_inference_steps={text}")[0].values == values


def test_a_negative_prompt_axis_comes_from_a_list_and_keeps_its_commas():
    spec = replace(resolve(None, {"prompts": ["a.txt"]}), sweep={"negative_prompt": ["a, b", ""]})
    assert build_axes(spec.sweep)[0].values == ("a, b", "")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("guidance_scale=3..9/5", (3.0, 4.5, 6.0, 7.5, 9.0)),
        ("guidance_scale=9..3/3", (9.0, 6.0, 3.0)),
        ("num_inference_steps=10..50/5", (10, 20, 30, 40, 50)),
        ("guidance_scale=1:3:0.5,7.5", (1.0, 1.5, 2.0, 2.5, 7.5)),
        ("guidance_scale=1:4", (1.0, 2.0, 3.0)),
        ("eta=0.1:0.5:0.1", (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_numbers_may_be_ranges_and_evenly_spaced_and_are_exactly_as_written(flag, values):
    assert axes_of(flag)[0].values == values


def test_the_lines_of_a_file_are_the_values_of_an_axis(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffa cat, sitting\r\n\n  ein Hund\n{x}\n".encode())
    values = ("a cat, sitting", "  ein Hund", "{x}")
    for name in ("prompt", "negative_prompt"):
        spec = resolve(None, {"prompts": ["a.txt"], "sweep": [f"{name}=@{path}"]})
        assert build_axes(spec.sweep)[0].values == values
    (tmp_path / "job.yaml").write_text(f"prompts: a.txt\nsweep:\n  prompt: '@{path}'\n  negative_prompt: ['@x', '']\n")
    spec = resolve(str(tmp_path / "job.yaml"), {})
    assert [axis.values for axis in build_axes(spec.sweep)] == [values, ("@x", "")]


@pytest.mark.parametrize(
    ("flag", "name", "values"),
    [
        ("prompt.s/red/{blue,green}/", "prompt.s/red/", ("blue", "green")),
        ("prompt.s|red car|{red car,a\\,b,}|", "prompt.s/red car/", ("red car", "a,b", "")),
        ("prompt.s/red/blue/", "prompt.s/red/", ("blue",)),
        ("prompt.s/red/=blue,dark green", "prompt.s/red/", ("blue", "dark green")),
        ("negative-prompt.s,a\\,b,{x=1},", "negative_prompt.s/a,b/", ("x=1",)),
        ("prompt.s|a/b|{c}|", "prompt.s/a\\/b/", ("c",)),
    ],
)
def test_search_and_replace_is_an_axis(flag, name, values):
    (axis,) = build_axes(resolve(None, {"prompts": ["a.txt"], "sweep": [flag]}).sweep)
    assert (axis.name, axis.values) == (name, values)
    as_in_a_file = resolve(None, {"prompts": ["a.txt"], "sweep": {axis.name: list(values)}})
    assert build_axes(as_in_a_file.sweep) == (axis,)


def zipped(*flags, zip):  # noqa: A002 - the setting's name
    return resolve(None, {"prompts": ["a.txt"], "sweep": list(flags), "zip": zip})


def test_zipped_axes_vary_together_at_the_place_of_the_first():
    spec = zipped("width=256,512,256", "seed=0:2", "height=512,256,256", zip=["height,width"])
    dimensions = build_dimensions(build_axes(spec.sweep), spec.zip)
    assert [[axis.name for axis in dimension] for dimension in dimensions] == [["width", "height"], ["seed"]]
    assert count_combinations(dimensions) == 6
    shown = joined_axis(dimensions[0], "{} {}".format)
    assert shown.name == "width with height"
    assert shown.values == ("width 256, height 512", "width 512, height 256", "width 256, height 256")


@pytest.mark.parametrize(
    ("zip", "words"),
    [
        (["width"], ["two or more"]),
        (["width,depth"], ["'depth'", "no axis of the sweep", "width, height, seed"]),
        (["width,height", "seed,width"], ["width twice"]),
        (["width,width"], ["width twice"]),
        (["seed,width"], ["seed has 3 values", "width has 2 values"]),
        (["seed=1,width"], ["'seed=1'", "no axis"]),
    ],
)
def test_a_bad_zip_is_refused_in_one_line(zip, words):  # noqa: A002 - the setting's name
    with pytest.raises(UsageError) as caught:
        zipped("width=256,512", "height=256,512", "seed=0:3", zip=zip)
    assert all(word in str(caught.value) for word in words)


def test_zipped_axes_may_repeat_a_value_but_not_a_pair():
    with pytest.raises(UsageError, match="width with height has 256, 512 twice"):
        zipped("width=256,256", "height=512,512", zip=["width,height"])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("seed", ["'seed' is not AXIS=VALUES", "seed=0:16"]),
        ("seed=", ["not AXIS=VALUES"]),
        ("sed=1", ["'sed' is unknown, did you mean 'seed'", "guidance_scale"]),
        ("num_images=1,2", ["'num_images' is unknown"]),
        ("prompt=a", ["prompt would be split", "prompt=@FILE"]),
        ("seed=4:4", ["4:4 is empty"]),
        ("seed=a:b", ["'a:b' is not a range"]),
        ("seed=1:2:3:4", ["is not a range"]),
        ("seed=0:9:0", ["is not a range"]),
        ("seed=0:100000000000", ["100,000,000,000 values", "65,536"]),
        ("seed=1,1", ["seed has 1 twice"]),
        ("seed=0:3,2", ["seed has 2 twice"]),
        ("guidance_scale=1,1.0", ["has 1.0 twice"]),
        ("guidance_scale=x", ["'x' is not a number"]),
        ("guidance_scale=inf", ["inf is outside 0..100"]),
        ("sampler=euler_b", ["'euler_b' is unknown"]),
        ("width=0", ["width 0 is outside 1..4096"]),
        ("negative_prompt=a,b", ["job file"]),
        ("num_inference_steps=3..10/5", ["4.75", "not a whole number"]),
        ("guidance_scale=3..9/1", ["not a..b/n"]),
        ("guidance_scale=x..9/3", ["not a..b/n"]),
        ("seed=0..1/99999999", ["99,999,999 values", "65,536"]),
        ("guidance_scale=1:9:1e-30", ["is not a range"]),
        ("seed=0.5:3", ["is not a range"]),
        ("prompt=@/nowhere/x.txt", ["/nowhere/x.txt does not exist"]),
        ("prompt.s/red/{blue", ["is not a search and replace"]),
        ("prompt.s/red/{blue}/x", ["is not a search and replace"]),
        ("prompt.s//{blue}/", ["1 to 200 printable bytes"]),
        ("prompt.s/a\nb/{blue}/", ["1 to 200 printable bytes"]),
        ("prompt.s/red/{blue,blue}/", ["has 'blue' twice"]),
        ("seed=1,,2", ["'' is not a whole number"]),
    ],
)
def test_a_bad_axis_is_refused_in_one_line(flag, words):
    with pytest.raises(UsageError) as caught:
        resolve(None, {"prompts": ["a.txt"], "sweep": [flag]})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_one_axis_given_twice_is_refused():
    with pytest.raises(UsageError, match="seed is given twice"):
        resolve(None, {"prompts": ["a.txt"], "sweep": ["seed=1", "seed=2"]})
