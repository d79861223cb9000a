"""The command says what it did, for people and for machines, and the page's examples work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentmill import cli
from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.outputs.score import ScoreProgress, score
from latentmill.jobs.scores.scorer import check_identity, score_batch
from latentmill.jobs.scores.spec import ScoreSpec
from tests.jobs.driver import job_spec, run

PAGE = (Path(__file__).parents[3] / "docs/scores.md").read_text(encoding="utf-8")


@pytest.fixture
def out(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path) -> str:
    out = str(tmp_path / "out/sample")
    run(job_spec(tiny_model, manifest([f"picture {number}" for number in range(40)]), out, chunk_size=8))
    return out


def call(*words: str) -> None:
    cli.app(["score", *words], standalone_mode=False)


def test_it_answers_in_json_with_the_duplicates(out: str, capfd: pytest.CaptureFixture[str]):
    call(out, "--with", "sharpness,phash", "--distance", "16", "--json")
    answer = json.loads(capfd.readouterr().out)
    sharpness, phash = answer["scorers"]
    assert [sharpness[key] for key in ("name", "version", "rows", "scored", "parts", "written")] == [
        "sharpness",
        "1",
        40,
        40,
        1,
        1,
    ]
    assert sharpness["columns"]["sharpness"] == sorted(sharpness["columns"]["sharpness"])
    found = phash["duplicates"]
    assert (sharpness["duplicates"], found["pictures"], found["distance"]) == (None, 40, 16)
    assert found["total"] == len(found["pairs"]) > 0
    assert set(found["pairs"][0]) == {"first", "second", "distance"}


def test_it_answers_in_tables_and_says_nothing_when_quiet(out: str, capfd: pytest.CaptureFixture[str]):
    call(out, "--with", "sharpness,phash", "--distance", "16")
    words = " ".join(capfd.readouterr().out.split())
    assert re.search(r"sharpness 40 of 40 [\d.]+ [\d.]+ [\d.]+ 1", words)
    assert "near duplicates, up to 16 bits apart" in words
    call(out, "--with", "sharpness,phash", "--quiet")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    call(out, "--with", "sharpness")
    assert "1, of which 1 were there" in " ".join(capfd.readouterr().out.split())


def test_refusals_have_the_exit_codes_of_the_help(out: str):
    with pytest.raises(UsageError, match=r"distance 17 is outside 0\.\.16"):
        call(out, "--with", "phash", "--distance", "17")
    assert (UsageError.exit_code, OutputConflictError.exit_code) == (2, 3)


def test_progress_counts_rows_and_never_goes_back(out: str):
    seen: list[ScoreProgress] = []
    score(out, ["sharpness"], ScoreSpec(), rows_per_part=25, on_progress=seen.append)
    done = [step.done for step in seen]
    assert done == sorted(done)
    assert (done[0], done[-1], seen[0].total) == (0, 40, 40)
    assert set(done) == {0, 16, 25, 40}, "a step for each batch"


def test_the_examples_of_the_page_work(out: str, monkeypatch: pytest.MonkeyPatch):
    import duckdb

    score(out, ["sharpness", "phash"], ScoreSpec())
    monkeypatch.chdir(Path(out).parents[1])
    read, own = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, object] = {}
    exec(read, scope)
    assert scope["table"].column_names == ["prompt", "sharpness", "phash"]
    (query,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    joined = duckdb.sql(query).fetchall()
    assert len(joined) == 40
    exec(own, scope)
    scorer = scope["Brightness"]()
    check_identity(scorer.name, scorer.version, scorer.columns)
    white = np.full((8, 8, 3), 255, np.uint8)
    assert score_batch(scorer, [white], ["one"]) == {"brightness": [255.0], "brightness_word": ["bright"]}
