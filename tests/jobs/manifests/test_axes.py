"""Sweep axes: ranges, lists, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job_file import resolve
from latentmill.jobs.manifests.axes import build_axes, count_combinations, parse_axis


def axes_of(*flags):
    return build_axes(dict(parse_axis(flag) for flag in flags))


def test_values_have_their_parameters_type_and_order():
    guidance, seed, sampler = axes_of("guidance_scale=7.5,3,5", "seed=0:4", "sampler=plms,ddim")
    assert guidance.values == (7.5, 3.0, 5.0)
    assert all(isinstance(value, float) for value in guidance.values)
    assert seed.values == (0, 1, 2, 3)
    assert sampler.values == ("plms", "ddim")
    assert count_combinations((guidance, seed, sampler)) == 24
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
    ("flag", "words"),
    [
        ("seed", ["'seed' is not AXIS=VALUES", "seed=0:16"]),
        ("seed=", ["not AXIS=VALUES"]),
        ("sed=1", ["'sed' is unknown, did you mean 'seed'", "guidance_scale"]),
        ("num_images=1,2", ["'num_images' is unknown"]),
        ("prompt=a", ["'prompt' is unknown"]),
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
