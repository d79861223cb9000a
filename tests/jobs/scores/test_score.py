"""Scores lie beside a dataset, are made once, and belong to the pixels that they were made from."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

import latentmill
from latentmill.engine.types import Pixels
from latentmill.jobs.errors import JobError, OutputConflictError, UsageError
from latentmill.jobs.outputs.score import score
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.scores.scorer import score_batch
from latentmill.jobs.scores.sharpness import Sharpness
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import PROCESSES, job_spec, run
from tests.jobs.traps import KillAt, arm

PROMPTS = ["one", "two", "some nsfw", "some poison", "five", "six", "seven"]
SPEC = ScoreSpec()


@pytest.fixture
def out(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> str:
    """Seven rows, of which one is flagged and blank, and one failed."""
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


def files(out: str, prefix: str = "") -> dict[str, str]:
    storage = Storage.open(out)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list(prefix)}


def test_scores_are_columns_of_the_dataset_and_none_of_its_files_changes(out: str):
    before = files(out)
    summary = score(out, ["sharpness"], SPEC, rows_per_part=3)
    after = files(out)
    assert {path: digest for path, digest in after.items() if not path.startswith("scores/")} == before
    assert "scores/sharpness/manifest.json" in after
    assert len(after) == len(before) + 4
    (scorer,) = summary.scorers
    assert (scorer.rows, scorer.scored, scorer.parts, scorer.written) == (7, 5, 3, 3)
    dataset = latentmill.open_dataset(out)
    rows = list(dataset)
    expected = [
        None
        if row["status"] != "ok"
        else np.float32(Sharpness().score([np.asarray(dataset.image(row))], [""])["sharpness"][0])
        for row in rows
    ]
    assert [row["sharpness"] for row in rows] == expected
    assert dataset.table(["sharpness"]).column("sharpness").to_pylist() == expected
    assert dataset.table(["sharpness", "prompt"]).column_names == ["sharpness", "prompt"]
    known = [value for value in expected if value is not None]
    least, mean, greatest = scorer.columns["sharpness"]
    assert (least, greatest, mean) == (min(known), max(known), pytest.approx(np.mean(known)))


def test_flagged_pictures_are_scored_where_they_were_kept(
    tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path
):
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out, on_flagged="keep"))
    score(out, ["sharpness"], SPEC)
    scored = {row["prompt"]: row["sharpness"] is not None for row in latentmill.open_dataset(out)}
    assert scored == {prompt: "poison" not in prompt for prompt in PROMPTS}


def test_a_sharp_picture_scores_higher_than_its_blurred_copy():
    sharp = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    first, second, flat = Sharpness().score([sharp, cv2.GaussianBlur(sharp, (5, 5), 2), sharp * 0], ["", "", ""])[
        "sharpness"
    ]
    assert first > 20 * second > flat == 0


def test_the_same_command_again_makes_nothing_and_changes_nothing(out: str, monkeypatch: pytest.MonkeyPatch):
    score(out, ["sharpness"], SPEC, rows_per_part=3)
    before = files(out)
    monkeypatch.delattr(Sharpness, "score")
    (scorer,) = score(out, ["sharpness"], SPEC, rows_per_part=3).scorers
    assert (scorer.parts, scorer.written, scorer.scored) == (3, 0, 5)
    assert files(out) == before


def _score_and_die(out: str, trap: KillAt) -> None:
    arm(trap)
    score(out, ["sharpness"], SPEC, rows_per_part=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "prefix", "nth"),
    [
        ("before", "scores/sharpness/part", 1),
        ("after", "scores/sharpness/part", 2),
        ("before", "scores/sharpness/manifest", 1),
    ],
)
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(out: str, when: str, prefix: str, nth: int):
    process = PROCESSES.Process(target=_score_and_die, args=(out, KillAt(when, "write", prefix, nth)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert "sharpness" not in latentmill.open_dataset(out)[0], "what is not whole is not shown"
    assert verify(out).defects == ()
    there = len(files(out, "scores"))
    (scorer,) = score(out, ["sharpness"], SPEC, rows_per_part=2).scorers
    assert (scorer.parts, scorer.parts - scorer.written) == (4, there)
    resumed = files(out, "scores")
    for path in resumed:
        Storage.open(out).delete(path)
    score(out, ["sharpness"], SPEC, rows_per_part=2)
    assert files(out, "scores") == resumed


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [("string", "word", "half \ud800"), ("string", "", 3), ("int64", -3, 1.5), ("int64", 0, 1 << 63)],
)
def test_values_are_of_the_type_of_their_column(kind: str, good: object, bad: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Wrong, "columns", {"wrong": kind})
    picture = [np.zeros((8, 8, 3), np.uint8)]
    assert score_batch(Wrong({"wrong": [good]}), picture, ["one"]) == {"wrong": [good]}
    with pytest.raises(JobError, match=rf"gave .* as wrong, which is {kind}"):
        score_batch(Wrong({"wrong": [bad]}), picture, ["one"])


def test_two_at_once_end_with_the_same_whole_scores(out: str):
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(score, out, ["sharpness", "phash"], SPEC, rows_per_part=2) for _ in range(2)]
        for future in both:
            future.result()
    together = files(out, "scores")
    assert verify(out).defects == ()
    for path in together:
        Storage.open(out).delete(path)
    score(out, ["sharpness", "phash"], SPEC, rows_per_part=2)
    assert files(out, "scores") == together


def test_on_s3(tiny_model: Path, manifest: Callable[..., Path], s3: str):
    out = f"{s3}/out"
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    assert score(out, ["sharpness", "phash"], SPEC, rows_per_part=3).scorers[1].written == 3
    assert score(out, ["sharpness", "phash"], SPEC, rows_per_part=3).scorers[1].written == 0
    assert verify(out).defects == ()
    assert latentmill.open_dataset(out)[0]["sharpness"] > 0


def test_a_picture_that_is_not_its_rows_is_named_with_the_remedy(out: str):
    path = latentmill.open_dataset(out)[1]["image"]
    storage = Storage.open(out)
    data = storage.read(path)
    storage.write(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(JobError, match=rf"{path} .*sha256 of its row; heal it by: latentmill repair"):
        score(out, ["sharpness"], SPEC)
    storage.delete(path)
    with pytest.raises(JobError, match=rf"{path} .*it is missing; heal it by: latentmill repair"):
        score(out, ["sharpness"], SPEC)
    assert files(out, "scores") == {}


def test_scores_of_another_version_are_refused_until_they_are_to_be_replaced(out: str, monkeypatch: pytest.MonkeyPatch):
    score(out, ["sharpness"], SPEC)
    before = files(out, "scores")
    monkeypatch.setattr(Sharpness, "version", "2")
    with pytest.raises(
        OutputConflictError, match=r"scores/sharpness is of version 1, and the scorer here is of version 2"
    ):
        score(out, ["sharpness"], SPEC)
    assert files(out, "scores") == before
    score(out, ["sharpness"], ScoreSpec(replace=True))
    after = files(out, "scores")
    assert len(after) == len(before) == 2
    assert after.keys() != before.keys()
    assert json.loads(Storage.open(out).read("scores/sharpness/manifest.json"))["version"] == "2"


def test_unknown_scorers_and_doubles_are_refused_in_one_line(out: str, tmp_path: Path):
    with pytest.raises(UsageError, match="'sharpnes' does not exist, did you mean 'sharpness'"):
        score(out, ["sharpnes"], SPEC)
    with pytest.raises(UsageError, match="'sharpness' is named twice"):
        score(out, ["sharpness", "sharpness"], SPEC)
    with pytest.raises(JobError, match="has no plan"):
        score(str(tmp_path / "none"), ["sharpness"], SPEC)
    Storage.open(out).delete("_job/dataset.json")
    with pytest.raises(JobError, match="has no published dataset"):
        score(out, ["sharpness"], SPEC)


def test_a_dataset_with_a_column_of_that_name_is_refused(tiny_model: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,sharpness\none,3\n")
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, prompts, out))
    with pytest.raises(UsageError, match="has one of that name, from its manifest; rename it there"):
        score(out, ["sharpness"], SPEC)


class Wrong:
    """A scorer that gives what it is told to."""

    name, version, columns = "wrong", "1", {"wrong": "float32"}

    def __init__(self, given: Mapping[str, Sequence[object]]) -> None:
        self.given = given

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Mapping[str, Sequence[object]]:
        return self.given


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"wrong": []},
        {"wrong": [1.0], "more": [1.0]},
        {"wrong": [float("nan")]},
        {"wrong": [1e39]},
        {"wrong": ["text"]},
        {"wrong": [True]},
    ],
)
def test_a_scorer_that_gives_what_it_does_not_declare_is_named(given: Mapping[str, Sequence[object]]):
    with pytest.raises(JobError, match="the scorer wrong gave"):
        score_batch(Wrong(given), [np.zeros((8, 8, 3), np.uint8)], ["one"])
    assert score_batch(Wrong({"wrong": [np.float32(2)]}), [np.zeros((8, 8, 3), np.uint8)], ["one"]) == {"wrong": [2.0]}
    assert score_batch(Wrong({"wrong": [None]}), [np.zeros((8, 8, 3), np.uint8)], ["one"]) == {"wrong": [None]}
