"""Sampling and checking, apart: another thread may check while the model samples, and nothing unchecked passes."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from latentmill.engine import (
    Engine,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    SafetyVerdict,
    UncheckedResult,
    acceleration,
)

ROWS = [
    GenerationRequest(prompt=f"picture {n}", seed=n, width=64, height=64, num_inference_steps=2, guidance_scale=3.0)
    for n in range(8)
]


@pytest.fixture(scope="module")
def checking(eps_model: Path) -> Engine:
    """The tiny model with the real default checker."""
    return Engine.load(ModelSpec(model=str(eps_model)), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def sampled(checking: Engine) -> list[UncheckedResult]:
    return checking.sample(ROWS)


def same(found: list[GenerationResult], expected: list[GenerationResult]) -> bool:
    return [replace(result, pixels=None) for result in found] == [
        replace(result, pixels=None) for result in expected
    ] and all(np.array_equal(*pair) for pair in zip(pixels(found), pixels(expected), strict=True))


def pixels(results: list[GenerationResult]) -> list[np.ndarray]:
    return [result.pixels for result in results]


def test_generating_is_sampling_and_then_checking(checking, sampled):
    results = checking.check(sampled)
    assert same(results, checking.generate(ROWS))
    assert {result.status for result in results} == {"ok"}
    assert len({result.safety.score for result in results}) == len(ROWS), "equal scores prove nothing"


def test_a_verdict_does_not_depend_on_what_is_checked_with_it(checking, sampled):
    expected = checking.check(sampled)
    order = [5, 0, 7, 2, 6, 1, 4, 3]
    assert same(checking.check([sampled[number] for number in order]), [expected[number] for number in order])
    assert same([checking.check([one])[0] for one in sampled], expected)


def test_threads_check_while_the_model_samples_and_change_no_bit(checking, sampled):
    expected = checking.check(sampled)
    stop = threading.Event()

    def check_until_stopped() -> list[list[GenerationResult]]:
        rounds = [checking.check(sampled)]
        while not stop.is_set():
            rounds.append(checking.check(sampled))
        return rounds

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(check_until_stopped) for _ in range(2)]
        again = checking.sample(ROWS)
        stop.set()
        rounds = [results for future in running for results in future.result()]
    assert all(same(results, expected) for results in rounds)
    assert same(checking.check(again), expected)


def test_an_unchecked_result_has_nothing_by_which_it_could_pass(sampled):
    names = {field.name for field in fields(UncheckedResult)}
    assert not names & {"pixels", "safety", "status"}
    assert not hasattr(sampled[0], "status")
    assert not isinstance(sampled[0], GenerationResult)


@pytest.mark.parametrize("lost", ["judged", "kept"])
def test_a_picture_that_is_lost_on_the_way_fails(checking, sampled, lost):
    (result,) = checking.check([replace(sampled[0], **{lost: None})])
    assert (result.status, result.pixels, result.safety) == ("failed", None, None)


def test_what_failed_is_never_shown_to_the_checker(checking, monkeypatch):
    seen = []

    class Checker:
        def check(self, pixels):
            seen.append(pixels)
            return SafetyVerdict(checker="test", score=0.0, flagged=False)

    monkeypatch.setattr(checking, "_safety", Checker())
    found = checking.sample([ROWS[0], replace(ROWS[1], width=65), ROWS[2]])
    assert seen == []
    assert [result.status for result in checking.check(found)] == ["ok", "failed", "ok"]
    assert len(seen) == 2


def test_a_batch_is_waited_for_when_the_next_one_has_begun(checking, monkeypatch):
    events: list[str] = []
    decode, wait = type(checking._models)._decode, acceleration.Download.wait
    begun = lambda self, *rest: (events.append("begin"), decode(self, *rest))[1]  # noqa: E731 - as short as its twin
    waited = lambda self: (events.append("wait"), wait(self))[1]  # noqa: E731
    monkeypatch.setattr(type(checking._models), "_decode", begun)
    monkeypatch.setattr(acceleration.Download, "wait", waited)
    assert len(checking.sample(ROWS)) == 8
    assert [name for name, *_ in map(tuple, itertools.groupby(events))] == ["begin", "wait"]
    assert events[:2] == ["begin", "begin"]
