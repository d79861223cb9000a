"""Chunks and samples by arithmetic equal a naive enumeration of rows, axes and images."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from latentmill.engine import GenerationRequest, count_passes, passes
from latentmill.jobs.plans import snapshot
from latentmill.jobs.plans.plan import adopt, draft_plan, load_plan
from latentmill.jobs.plans.summary import count_denoising
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage

CHOICES = {
    "seed": [None, 1, 77, 4_000_000_000],
    "width": [None, 256, 264],
    "height": [None, 256, 320],
    "num_inference_steps": [None, 3, 5],
    "guidance_scale": [None, 0.5, 1.0, 1.5, 7.5],
    "sampler": [None, "ddim", "plms"],
    "negative_prompt": [None, "", "ugly"],
    "num_images": [None, 1, 2, 5],
}
AXES = {
    "seed": [5, 0, 9],
    "width": [264, 256],
    "height": [256, 272],
    "num_inference_steps": [4, 2],
    "guidance_scale": [3.0, 1.0, 0.0, 5.0],
    "sampler": ["plms", "ddim"],
    "eta": [0.0],
    "negative_prompt": ["x", "y, z"],
    "prompt": ["p1", "q p"],
    "prompt.s/p/": ["p", "zebra", ""],
}


def random_zip(rng, sweep):
    """Perhaps two of the axes, cut to the same length, vary together."""
    if len(sweep) < 2 or rng.random() < 0.5:
        return []
    names = rng.sample(list(sweep), 2)
    length = min(len(sweep[name]) for name in names)
    for name in names:
        sweep[name] = sweep[name][:length]
    return [names]


def random_job(seed):
    """Random rows with a random choice of columns, random axes, random sizes of parts and chunks."""
    rng = random.Random(seed)
    columns = [name for name in CHOICES if rng.random() < 0.4]
    rows = [
        {"prompt": f"p{number}", "tag": number, **{name: rng.choice(CHOICES[name]) for name in columns}}
        for number in range(rng.randint(1, 25))
    ]
    names = rng.sample(list(AXES), rng.randint(0, 3))
    sweep = {name: rng.sample(AXES[name], rng.randint(1, len(AXES[name]))) for name in names}
    zips = random_zip(rng, sweep)
    return rows, sweep, zips, rng.randint(1, 9), rng.randint(1, 8)


def enumerate_naively(rows, sweep, zips, defaults):
    """All samples in the manifest's order."""
    samples = []
    together = dict.fromkeys(zips[0], zips[0]) if zips else {}
    groups = list(dict.fromkeys(tuple(name for name in sweep if name in together.get(axis, [axis])) for axis in sweep))
    for row in rows:
        for combination in itertools.product(*(zip(*map(sweep.get, group), strict=True) for group in groups)):
            pairs = zip(groups, combination, strict=True)
            swept = {name: value for group, values in pairs for name, value in zip(group, values, strict=True)}
            replaced = swept.pop("prompt.s/p/", "p")
            given = defaults | {name: value for name, value in row.items() if value is not None} | swept
            given["prompt"] = given["prompt"].replace("p", replaced)
            has_seed = "seed" in swept or row.get("seed") is not None
            for image in range(given["num_images"]):
                seed = given["seed"] + image if has_seed else defaults["seed"] + len(samples)
                names = GenerationRequest.__dataclass_fields__.keys() - {"seed", "loras"}
                samples.append((row["tag"], GenerationRequest(seed=seed, **{name: given[name] for name in names})))
    return samples


@pytest.mark.parametrize("seed", range(60))
def test_arithmetic_equals_enumeration(seed, tmp_path, tiny_model, monkeypatch):
    rows, sweep, zips, chunk_size, part_rows = random_job(seed)
    monkeypatch.setattr(snapshot, "PART_ROWS", part_rows)
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "seed": 1000,
        "num_inference_steps": 7,
        "guidance_scale": 2.0,
        "num_images": 3,
        "negative_prompt": "default",
    }
    spec = JobSpec(
        prompts=(str(path),),
        out=str(tmp_path / "out"),
        model=str(tiny_model),
        sweep=sweep,
        zip=tuple(map(tuple, zips)),
        chunk_size=chunk_size,
        **flags,
    )
    with draft_plan(spec) as draft:
        plan = adopt(draft, Storage.open(spec.out))
        assert len(draft.snapshot.parts) == -(-len(rows) // part_rows)
    defaults = flags | {"width": 256, "height": 256, "sampler": "ddim", "eta": 0.0, "image": None, "strength": None}
    expected = enumerate_naively(rows, sweep, zips, defaults)

    chunks = [plan.samples_of_chunk(chunk) for chunk in range(plan.n_chunks)]
    samples = sorted((sample for chunk in chunks for sample in chunk), key=lambda sample: sample.ordinal)
    assert [sample.ordinal for sample in samples] == list(range(plan.n_samples))
    assert [(sample.extra["tag"], sample.request) for sample in samples] == expected
    assert [sample.sample_id for sample in samples] == [f"{number:08d}" for number in range(len(expected))]
    first = 0
    for section in plan.grid.sections:
        assert section.first_chunk == first
        inside = chunks[first : first + section.n_chunks]
        first += section.n_chunks
        assert {sample.request.shape for chunk in inside for sample in chunk} == {section.groups[0].key[:3]}
        assert [len(chunk) for chunk in inside[:-1]] == [chunk_size] * (section.n_chunks - 1)
        assert sum(map(len, inside)) == section.n_samples
        loops = [(sample.request.num_inference_steps, sample.request.sampler) for chunk in inside for sample in chunk]
        assert loops == sorted(loops)
    assert len({section.groups[0].key[:3] for section in plan.grid.sections}) == len(plan.grid.sections)
    assert [len({sample.request.loop for sample in chunk}) for chunk in chunks] == list(
        map(plan.groups_in, range(plan.n_chunks))
    )
    pieces = [list(group) for group in plan.pieces_of_groups()]
    assert sum(map(len, pieces)) == sum(map(plan.groups_in, range(plan.n_chunks)))
    for group, of_group in zip(plan.grid.groups, pieces, strict=True):
        own = [sample for chunk, places in of_group for sample in chunks[chunk][places]]
        assert {(*sample.request.shape, *reversed(sample.request.loop)) for sample in own} == {group.key}
        ordinals = [sample.ordinal for sample in own]
        assert ordinals == sorted(ordinals)
        assert len(ordinals) == group.n_samples
    assert len({group.key for group in plan.grid.groups}) == len(plan.grid.groups)
    for chunk, inside in enumerate(chunks):
        request = inside[-1].request
        assert plan.grid.pace_of(chunk) == ((0, *request.shape, *reversed(request.loop)), len(inside))
    for batch_size in (1, 2, 8):
        total, waste = count_denoising(plan.grid, batch_size)
        loops = [[sample.request.loop for sample in chunk] for chunk in chunks]
        assert total == sum(count_passes(inside, batch_size) for inside in loops)
        assert waste == pytest.approx(1 - sum(passes(loop) for inside in loops for loop in inside) / total / batch_size)
    chosen = np.random.default_rng(seed).random(plan.n_chunks) < 0.5
    assert plan.samples_in_chunks(chosen) == sum(len(chunk) for chunk, take in zip(chunks, chosen, strict=True) if take)


def test_a_chunk_reads_only_the_parts_it_needs(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(snapshot, "PART_ROWS", 10)
    path = tmp_path / "m.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(100)))
    spec = JobSpec(prompts=(str(path),), out=str(tmp_path / "out"), model=str(tiny_model), chunk_size=5)
    storage = Storage.open(spec.out)
    with draft_plan(spec) as draft:
        adopt(draft, storage)
    asked = []
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, name, *most: (asked.append(name), read(self, name, *most))[1])
    plan = load_plan(storage)
    assert [sample.request.prompt for sample in plan.samples_of_chunk(13)] == [f"prompt {n}" for n in range(65, 70)]
    plan.samples_of_chunk(12)
    assert len(asked) == 2  # plan.json and one part
    assert asked[1].endswith("-00006.parquet")


def test_a_chunk_outside_the_plan_is_an_error(tmp_path, tiny_model, manifest):
    spec = JobSpec(prompts=(str(manifest(3)),), out=str(tmp_path / "out"), model=str(tiny_model))
    with draft_plan(spec) as draft:
        plan = adopt(draft, Storage.open(spec.out))
    for chunk in (-1, 1):
        with pytest.raises(IndexError, match=r"outside 0\.\.0"):
            plan.samples_of_chunk(chunk)
