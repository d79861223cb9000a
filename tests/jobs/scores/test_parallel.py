"""Scoring by tasks of a Ray cluster, and scoring again what has changed only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

import latentmill
from latentmill.jobs.errors import JobError
from latentmill.jobs.job import open_job
from latentmill.jobs.outputs import score as score_module
from latentmill.jobs.outputs.publish import publish
from latentmill.jobs.outputs.score import score
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.scores.sharpness import Sharpness
from latentmill.jobs.scores.spec import ScoreSpec, make_score_spec
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.outputs.repairs import repair

PROMPTS = ["one", "two", "some nsfw", "some poison", "five", "six", "seven"]


@pytest.fixture
def out(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> str:
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(PROMPTS), out))
    return out


def files(out: str) -> dict[str, str]:
    storage = Storage.open(out)
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path, _ in storage.list("scores")}


def test_after_failed_samples_were_made_again_only_their_batch_is_scored_again(
    out: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(score_module, "BATCH", 2)
    assert score(out, ["sharpness"], ScoreSpec()).scorers[0].made == 5
    before = latentmill.open_dataset(out).table(["sharpness"]).column("sharpness").to_pylist()
    repair(out, 1)
    publish(open_job(out))
    assert [defect.kind for defect in verify(out).defects] == ["scores-wrong"]
    pictures: list[int] = []
    real = Sharpness.score
    monkeypatch.setattr(
        Sharpness, "score", lambda self, shown, prompts: (pictures.append(len(shown)), real(self, shown, prompts))[1]
    )
    (scorer,) = score(out, ["sharpness"], ScoreSpec()).scorers
    assert (scorer.made, pictures, scorer.scored, scorer.written) == (1, [1], 6, 1)
    assert verify(out).defects == ()
    rescored = files(out)
    values = latentmill.open_dataset(out).table(["sharpness"]).column("sharpness").to_pylist()
    assert values[:3] + values[4:] == before[:3] + before[4:]
    assert before[3] is None
    assert values[3] > 0
    for path in rescored:
        Storage.open(out).delete(path)
    assert score(out, ["sharpness"], ScoreSpec()).scorers[0].made == 6
    assert files(out) == rescored, "the bytes are those of scoring all of it"


def test_scores_of_another_version_are_never_taken_over(out: str, monkeypatch: pytest.MonkeyPatch):
    score(out, ["sharpness"], ScoreSpec())
    monkeypatch.setattr(Sharpness, "version", "2")
    monkeypatch.setattr(Sharpness, "score", lambda self, pictures, prompts: {"sharpness": [7.0] * len(pictures)})
    assert score(out, ["sharpness"], ScoreSpec(replace=True)).scorers[0].made == 5
    found = latentmill.open_dataset(out).table(["sharpness"]).column("sharpness").to_pylist()
    assert {value for value in found if value is not None} == {7.0}


@pytest.mark.cluster
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # Ray 2.60 uses its own old settings
def test_scores_on_ray_have_the_same_bytes_resume_and_tell_the_same_errors(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names = ["sharpness", "phash"]
    on_ray = make_score_spec({"executor": "ray", "workers": 2})
    told = score("out", names, on_ray, rows_per_part=2)  # a relative path, as a user types it
    assert [(scorer.parts, scorer.written, scorer.made, scorer.scored) for scorer in told.scorers] == [(4, 0, 0, 5)] * 2
    parallel = files(out)
    for path in parallel:
        Storage.open(out).delete(path)
    score(out, names, ScoreSpec(), rows_per_part=2)
    assert files(out) == parallel
    lost = sorted(path for path in parallel if "/part-" in path)[1]
    Storage.open(out).delete(lost)
    score(out, names, on_ray, rows_per_part=2)
    assert files(out) == parallel
    (picture,) = Path(out).glob("images/*/*/00000004.png")
    picture.write_bytes(picture.read_bytes()[:-1] + b"?")
    for path in parallel:
        Storage.open(out).delete(path)
    with pytest.raises(JobError, match=r"00000004\.png in .* cannot be scored: .*latentmill repair"):
        score(out, names, on_ray, rows_per_part=2)
    with pytest.raises(JobError, match="device cuda needs a GPU, and the cluster has 0"):
        score(out, ["embedding"], make_score_spec({"executor": "ray", "device": "cuda"}), rows_per_part=2)
