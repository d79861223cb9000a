"""Scorers of other packages are found by their entry points, and what is wrong with them is told in one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import latentmill
from latentmill.jobs.errors import UsageError
from latentmill.jobs.outputs.score import score
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.scores.spec import ScoreSpec
from latentmill.jobs.scores.table import SCORERS, load_scorers
from tests.jobs.driver import job_spec, run

CODE = """
class Brightness:
    name = "brightness"
    version = "3"
    columns = {"brightness": "float32", "brightness_words": "int64", "brightness_word": "string"}

    def score(self, pictures, prompts):
        return {
            "brightness": [picture.mean() for picture in pictures],
            "brightness_words": [len(prompt.split()) for prompt in prompts],
            "brightness_word": [prompt.split()[0] if "two" not in prompt else None for prompt in prompts],
        }


class Loaded(Brightness):
    version = "of the spec"

    @classmethod
    def load(cls, spec):
        made = cls()
        made.version = f"distance {spec.distance}"
        return made


class Misnamed(Brightness):
    name = "another"


class Hashless(Brightness):
    hash_column = "brightness"


class Hashed(Brightness):
    columns = {"brightness_bits": "string"}
    hash_column = "brightness_bits"

    def score(self, pictures, prompts):
        return {"brightness_bits": [f"{3 if 'two' in prompt else 1:016x}" for prompt in prompts]}


class Greedy(Brightness):
    columns = {"prompt": "float32"}
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package with a dist-info on the path, as pip would."""

    def into(distribution: str = "bright", **points: str) -> None:
        folder = tmp_path / distribution
        information = folder / f"{distribution}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {place}\n" for name, place in points.items())
        (information / "entry_points.txt").write_text(f"[latentmill.scorers]\n{lines}")
        (folder / f"{distribution}.py").write_text(CODE)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, distribution, raising=False)
        importlib.invalidate_caches()

    return into


def test_a_scorer_of_another_package_adds_its_columns(
    install: Install, tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path
):
    install(brightness="bright:Brightness")
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(["one", "two words", "some nsfw"]), out))
    score(out, ["brightness", "sharpness"], ScoreSpec())
    assert verify(out).defects == ()
    rows = list(latentmill.open_dataset(out))
    assert [row["brightness_words"] for row in rows] == [1, 2, None]
    assert [row["brightness_word"] for row in rows] == ["one", None, None]
    assert rows[0]["brightness"] > 0 < rows[0]["sharpness"]


def test_a_column_of_hashes_finds_near_duplicates(
    install: Install, tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path
):
    install(brightness="bright:Hashed")
    out = str(tmp_path / "out")
    run(job_spec(tiny_model, manifest(["one", "two", "three"]), out))
    (scorer,) = score(out, ["brightness"], ScoreSpec(distance=1)).scorers
    assert scorer.duplicates is not None
    found = [(pair.first, pair.second, pair.distance) for pair in scorer.duplicates.pairs]
    assert found == [("00000000", "00000002", 0), ("00000000", "00000001", 1)]


def test_a_class_with_load_gets_the_settings(install: Install):
    install(brightness="bright:Loaded")
    (scorer,) = load_scorers(["brightness"], ScoreSpec(distance=7))
    assert scorer.version == "distance 7"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("bright:Misnamed", r"it calls itself 'another'"),
        ("bright:Hashless", r"its hash_column 'brightness' is no column of the type string"),
        ("bright:Greedy", r"its column 'prompt' is neither brightness nor begins with brightness_"),
        (
            "bright:Missing",
            r"'brightness' of bright cannot be loaded: AttributeError: .*Missing.*; mend or uninstall it",
        ),
        ("nothing:Missing", r"cannot be loaded: ModuleNotFoundError: .*nothing"),
        ("bright:CODE.name", r"cannot be loaded"),
    ],
)
def test_what_is_wrong_with_a_scorer_of_another_package_is_told(install: Install, place: str, message: str):
    install(brightness=place)
    with pytest.raises(UsageError, match=message):
        load_scorers(["brightness"], ScoreSpec())


def test_two_scorers_of_one_name_are_refused(install: Install):
    install("bright", brightness="bright:Brightness", sharpness="bright:Brightness")
    install("brighter", brightness="brighter:Brightness")
    with pytest.raises(UsageError, match=r"several scorers 'brightness', also by bright, brighter; uninstall"):
        load_scorers(["brightness"], ScoreSpec())
    with pytest.raises(UsageError, match=r"several scorers 'sharpness', also by bright; uninstall"):
        load_scorers(["sharpness"], ScoreSpec())
    with pytest.raises(UsageError, match=r"there is sharpness, .*brightness"):
        load_scorers(["nothing"], ScoreSpec())


def test_every_entry_of_the_table_is_a_class_of_its_own_file():
    for name, entry in SCORERS.items():
        module, _, attribute = entry.place.partition(".")
        assert module == name
        scorer_class = getattr(importlib.import_module(f"latentmill.jobs.scores.{module}"), attribute)
        assert scorer_class.name == name
        assert all(f"`{column}`" in entry.what for column in scorer_class.columns)
