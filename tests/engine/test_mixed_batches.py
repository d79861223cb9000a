"""Rows with different samplers, steps and guidance in one batch: the same bits as apart, and slots that never wait."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from latentmill.engine import EMBEDDED_MODEL, SAMPLERS, Engine, GenerationRequest, ModelSpec
from latentmill.engine.sampling.queues import count_passes, passes, queue_rows
from latentmill.engine.sampling.table import SAMPLER_TABLE
from latentmill.engine.types import Pixels
from tests.harness.models import write_model

pytestmark = pytest.mark.slow

BATCH = 4


def load(model: Path, **settings: str) -> Engine:
    spec = ModelSpec(model=str(model), safety="none", **settings)
    return Engine.load(spec, device="cpu", dtype="float32", batch_size=BATCH)


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return load(EMBEDDED_MODEL)


def row(number: int, **changes: object) -> GenerationRequest:
    values = {
        "prompt": f"a red circle, number {number}",
        "seed": number,
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 2.0 + number % 5,
    }
    return GenerationRequest(**{**values, **changes})  # type: ignore[arg-type]


def pictures(engine: Engine, rows: list[GenerationRequest]) -> list[Pixels]:
    results = engine.generate(rows)
    assert [result.error for result in results] == [None] * len(rows)
    return [result.pixels for result in results if result.pixels is not None]


def mixed_rows(**changes: object) -> list[GenerationRequest]:
    """Every sampler at two numbers of steps, with etas where they count, in no order."""
    loops = itertools.product(SAMPLERS, (2, 5))
    rows = [
        row(number, sampler=sampler, num_inference_steps=steps, eta=0.7 if sampler == "ddim" and steps == 5 else 0.0)
        for number, (sampler, steps) in enumerate(loops)
    ]
    rows += [row(90, eta=1.0, num_inference_steps=5), row(91, num_inference_steps=7, negative_prompt="blue")]
    rows = [GenerationRequest(**{**asdict(each), **changes}) for each in rows]
    random.Random(3).shuffle(rows)
    return rows


def asdict(request: GenerationRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


def test_every_samplers_rows_have_the_same_bits_mixed_and_apart(embedded):
    """In whatever slot, beside whatever neighbours, after whatever row: as in a batch of nothing but itself."""
    rows = mixed_rows()
    apart = [pictures(embedded, [each])[0] for each in rows]
    assert len({picture.tobytes() for picture in apart}) == len(rows)
    slots: dict[int, set[int]] = {place: set() for place in range(len(rows))}
    for seed in range(3):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        results = embedded.generate([rows[place] for place in order])
        for place, result in zip(order, results, strict=True):
            assert np.array_equal(result.pixels, apart[place]), rows[place]
            slots[place].add(result.batch_slot)
    assert max(map(len, slots.values())) > 1, "every row kept its slot: nothing was shown"


@pytest.mark.parametrize(
    ("written", "changes"),
    [
        ({}, {"guidance_scale": 1.0}),
        ({"prediction_type": "v_prediction", "scheduler": {"timestep_spacing": "trailing"}}, {}),
        ({"prediction_type": "sample", "scheduler": {"clip_sample": True}}, {}),
    ],
    ids=["unguided", "velocity", "clipped data"],
)
def test_mixed_and_apart_are_the_same_whatever_the_model_predicts(tmp_path, written, changes):
    engine = load(write_model(tmp_path / "model", **written))
    rows = mixed_rows(**changes)
    together = pictures(engine, rows)
    for each, picture in zip(rows, together, strict=True):
        assert np.array_equal(pictures(engine, [each])[0], picture), each


def test_rows_that_are_guided_or_not_and_of_other_lengths_go_into_batches_of_their_own(eps_model, monkeypatch):
    engine = load(eps_model, long_prompts="chunk")
    shapes = set()
    unet = engine._models.denoiser
    forward = unet.forward

    def seen(x, timesteps, context, **more):
        shapes.add((len(x), context.shape[1]))
        return forward(x, timesteps, context, **more)

    monkeypatch.setattr(unet, "forward", seen)
    rows = [
        row(0),
        row(1, guidance_scale=1.0),
        row(2, prompt="a long story " * 15),
        row(3, guidance_scale=0.0, num_inference_steps=5),
        row(4, num_inference_steps=2),
    ]
    together = pictures(engine, rows)
    assert shapes == {(8, 77), (4, 77), (8, 154)}
    for each, picture in zip(rows, together, strict=True):
        assert np.array_equal(pictures(engine, [each])[0], picture)


def test_given_noise_stays_with_its_row(eps_model):
    engine = load(eps_model)
    rows = [row(number, seed=0, num_inference_steps=2 + number % 4, eta=0.5) for number in range(7)]
    noise = [torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(number)) for number in range(7)]
    together = [result.pixels for result in engine.generate(rows, noise=noise)]
    for each, own, picture in zip(rows, noise, together, strict=True):
        assert np.array_equal(engine.generate([each], noise=[own])[0].pixels, picture)


def test_a_row_that_is_not_finite_fails_alone_in_a_mixed_batch(eps_model, monkeypatch):
    engine = load(eps_model)
    rows = [row(number, num_inference_steps=2 + number % 3, guidance_scale=1.0) for number in range(6)]
    alone = [pictures(engine, [each])[0] for each in rows]
    text = engine._models.text
    encode = text.encode

    def poisoned(texts, *more):
        encoded = encode(texts, *more)
        for place, prompt in enumerate(texts):
            if prompt == rows[3].prompt:
                encoded.context[place] = float("nan")
        return encoded

    monkeypatch.setattr(text, "encode", poisoned)
    results = engine.generate(rows)
    assert [result.status for result in results] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert "not finite" in str(results[3].error)
    for place in (0, 1, 2, 4, 5):
        assert np.array_equal(results[place].pixels, alone[place])


def counted(engine: Engine, rows: list[GenerationRequest], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs of the U-Net for these rows."""
    calls = []
    unet = engine._models.denoiser
    forward = unet.forward
    with monkeypatch.context() as patch:
        patch.setattr(unet, "forward", lambda *args, **more: (calls.append(1), forward(*args, **more))[1])
        pictures(engine, rows)
    return len(calls)


def test_slots_do_not_wait_for_the_longest_row(eps_model, monkeypatch):
    engine = load(eps_model)
    steps = [2, 12, 4, 6, 2, 8, 10, 4]
    rows = [row(number, num_inference_steps=count) for number, count in enumerate(steps)]
    assert counted(engine, rows, monkeypatch) == 12 == sum(steps) / BATCH
    uniform = [row(number, num_inference_steps=6) for number in range(9)]
    assert counted(engine, uniform, monkeypatch) == 18


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_table_says_how_often_a_sampler_needs_the_model(eps_model, monkeypatch, sampler):
    found = counted(load(eps_model), [row(0, sampler=sampler, num_inference_steps=9)], monkeypatch)
    assert abs(found - passes((sampler, 9))) <= 1
    assert round(found / 9) == SAMPLER_TABLE[sampler].passes


def test_queues_hold_every_row_once_and_are_short():
    chooser = random.Random(1)
    for _ in range(300):
        slots = chooser.randint(1, 9)
        loops = [(chooser.choice(SAMPLERS), chooser.randint(1, 60)) for _ in range(chooser.randint(1, 50))]
        queues = queue_rows(loops, slots)
        assert sorted(itertools.chain(*queues)) == list(range(len(loops)))
        costs = list(map(passes, loops))
        assert max(*costs, sum(costs) / slots) <= count_passes(loops, slots) <= sum(costs) / slots + max(costs)
        if len(loops) <= slots:
            assert queues == [[place] for place in range(len(loops))] + [[]] * (slots - len(loops))


def test_rows_with_one_loop_keep_their_order():
    assert queue_rows([("ddim", 5)] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
