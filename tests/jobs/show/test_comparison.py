"""The page of `latentmill compare`: where it is written, what it shows, and that no text becomes markup."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentmill.engine import GenerationRequest, GenerationResult
from latentmill.jobs.compare.compare import CompareError
from latentmill.jobs.plans.plan import Plan
from latentmill.jobs.show.comparison import compare_outputs, difference
from latentmill.jobs.store.storage import Storage
from tests.jobs.driver import job_spec, run
from tests.jobs.fakes import FakeEngine

HOSTILE = "a dog </script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PROMPTS = ["a cat", HOSTILE, "a \u202egod\u202c", "some nsfw", "gone"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class LaterEngine(FakeEngine):
    """Pictures of dogs are others than before; what was flagged is not any more."""

    def _result(self, request: GenerationRequest, slot: int) -> GenerationResult:
        result = super()._result(request, slot)
        assert result.pixels is not None
        assert result.safety is not None
        if "cat" not in request.prompt:
            result = replace(result, pixels=result.pixels // 2)
        return replace(result, safety=replace(result.safety, flagged=False))


def later_engine(plan: Plan, device: str) -> LaterEngine:
    return LaterEngine(batch_size=plan.batch_size)


@pytest.fixture(scope="module")
def nights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("nights")
    (folder / "before.txt").write_text("\n".join(PROMPTS))
    (folder / "after.txt").write_text("\n".join([*PROMPTS[:-1], "new"]))
    run(job_spec(tiny_model, folder / "before.txt", folder / "before", on_flagged="keep"))
    run(job_spec(tiny_model, folder / "after.txt", folder / "after"), engine_factory=later_engine)
    return str(folder / "before"), str(folder / "after")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_page_has_the_pairs_with_their_pictures_but_none_that_was_flagged(nights, tmp_path: Path):
    shown = compare_outputs(*nights, str(tmp_path / "page"), top=200)
    told = shown.to_dict()
    assert told["page"] == f"{tmp_path}/page/compare.html"
    assert (told["identical"], told["changed"], told["added"], told["removed"]) == (1, 3, 1, 1)
    assert json.loads((tmp_path / "page/compare.json").read_text()) == shown.found.to_dict()
    pictures = sorted(path.name[:-22] for path in (tmp_path / "page/pictures").iterdir())
    assert pictures == ["00001-after", *(f"0000{n}-{w}" for n in (2, 3) for w in ("after", "before", "difference"))]
    rest = {path for path in files(tmp_path / "page") if not path.startswith(("pictures/", "data/pairs-"))}
    own = {"compare.html", "compare.css", "compare.js", "compare.json", "common.css", "common.js", "icon.svg"}
    assert rest == own | {"data/meta.js"}


def test_without_a_place_nothing_is_written(nights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Storage, "write")
    assert compare_outputs(*nights, None, top=200).to_dict()["page"] is None


def test_a_page_is_written_again_over_itself_and_over_nothing_else(nights, tmp_path: Path):
    place = str(tmp_path / "page")
    compare_outputs(*nights, place, top=200)
    first = files(tmp_path / "page")
    compare_outputs(*nights, place, top=200)
    assert files(tmp_path / "page") == first
    compare_outputs(*nights, place, top=1)
    assert [path for path in files(tmp_path / "page") if path.startswith("pictures/")] == [
        path for path in first if path.startswith("pictures/00001")
    ]
    (tmp_path / "page/thesis.txt").write_text("mine")
    with pytest.raises(CompareError, match=r"holds something else \(thesis\.txt\); name an empty place with --out"):
        compare_outputs(*nights, place, top=200)


def test_a_page_inside_a_dataset_is_refused_before_anything_is_read(nights, monkeypatch: pytest.MonkeyPatch):
    for night in nights:
        with pytest.raises(CompareError, match="lies inside the dataset"):
            compare_outputs(*nights, f"{night}/report", top=200)
    with pytest.raises(CompareError, match="is a whole bucket or disk"):
        compare_outputs(*nights, "s3://bucket", top=200)


def test_a_page_goes_to_a_bucket(nights, s3: str):
    shown = compare_outputs(*nights, f"{s3}/page", top=1)
    assert shown.page == f"{s3}/page/compare.html"
    assert {"compare.html", "compare.json"} <= {path for path, _ in Storage.open(f"{s3}/page").list("")}


def test_the_difference_is_black_where_nothing_differs_and_white_where_most_does():
    one = np.full((4, 4, 3), 100, np.uint8)
    other = one.copy()
    other[0, 0] = (100, 104, 100)
    other[1, 1] = (116, 100, 99)
    seen = difference(one, other)
    assert seen.shape == (4, 4, 3)
    assert (seen[0, 0, 0], seen[1, 1, 0], seen[2, 2, 0]) == (128, 255, 0)
    assert difference(one, one).max() == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="it needs Chromium")
def test_a_browser_shows_hostile_prompts_as_text(nights, tmp_path: Path):
    compare_outputs(*nights, str(tmp_path / "page"), top=200)
    profile = f"--user-data-dir={tmp_path}/profile"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", profile, "--dump-dom"]
    page = (tmp_path / "page/compare.html").as_uri()
    done = subprocess.run([str(CHROMIUM), *options, page], capture_output=True, text=True, timeout=120, check=True)
    shown = done.stdout
    assert 'data-ready="yes"' in shown
    assert "<title>Compared</title>" in shown
    assert "&lt;/script&gt;&lt;script&gt;document.title='owned'" in shown
    assert '<img src="x"' not in shown
    assert 'title="invisible character">U+202E</span>god' in shown
    assert shown.count('<li><button class="trio"') == 3
    for count in ("<b>1</b>identical", "<b>3</b>changed", "<b>1</b>new", "<b>1</b>gone"):
        assert count in shown


def test_pictures_of_the_page_say_how_they_came_about(nights, tmp_path: Path):
    compare_outputs(*nights, str(tmp_path / "page"), top=200)
    for path in (tmp_path / "page/pictures").iterdir():
        with Image.open(path) as picture:
            assert b"trainedAlgorithmicMedia" in picture.info["xmp"]
