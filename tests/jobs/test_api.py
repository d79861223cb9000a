"""latentmill from Python: the example of the docs runs, and a dataset is read as it was published."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import latentmill
from latentmill.engine import Engine
from latentmill.jobs.errors import JobError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A small job of six pictures, three prompts by two values of an axis."""
    small = {"width": 256, "height": 256, "num_inference_steps": 1, "safety": "none", "executor": "inline"}
    place = {"model": str(tiny_model), "out": str(tmp_path_factory.mktemp("api") / "out"), "chunk_size": 2}
    return {**small, **place, "batch_size": 2, "sweep": {"guidance_scale": [1, 5]}}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("one\ntwo\nthree\n")
    return str(path)


@pytest.fixture(scope="module")
def out(prompts: str, settings: dict[str, object]) -> str:
    summary = latentmill.run(prompts, **settings)
    assert (summary.exit_code, summary.generated) == (0, 6)
    return str(settings["out"])


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path: Path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_a_plan_says_what_a_run_would_do_and_writes_nothing(prompts: str, settings: dict[str, object], tmp_path: Path):
    summary = latentmill.plan([prompts], **{**settings, "out": str(tmp_path / "nothing")})
    assert (summary.samples, summary.axes) == (6, {"guidance_scale": [1.0, 5.0]})
    assert not (tmp_path / "nothing").exists()


def test_a_dataset_has_its_rows_in_order_by_place_and_as_a_table(out: str):
    dataset = latentmill.open_dataset(out)
    rows = list(dataset)
    assert len(dataset) == len(rows) == 6
    assert [row["sample_id"] for row in rows] == [f"{number:08d}" for number in range(6)]
    assert [dataset[number] for number in (0, 5, -1)] == [rows[0], rows[5], rows[5]]
    with pytest.raises(IndexError):
        dataset[6]
    assert dataset.table().to_pylist() == rows
    assert dataset.table(["prompt"]).column_names == ["prompt"]
    assert dataset.counts == {"ok": 6, "flagged": 0, "failed": 0}


def test_a_rows_picture_is_that_of_its_file(out: str):
    from PIL import Image

    dataset = latentmill.open_dataset(out)
    row = dataset[3]
    picture = dataset.image(row)
    assert picture.size == (256, 256)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(Path(out) / row["image"])))
    assert dataset.image(3) == picture
    with pytest.raises(JobError, match=r"sample 00000003 has no picture: it is failed \(why\)"):
        dataset.image(row | {"image": None, "status": "failed", "error": "why"})
    with pytest.raises(JobError, match="heal it by: latentmill repair"):
        dataset.image(row | {"width": 64})


def test_an_altered_picture_is_refused_also_where_it_can_be_read(out: str):
    dataset = latentmill.open_dataset(out)
    small, large = sorted((2, 3), key=lambda number: dataset[number]["bytes"])
    file = Path(out) / dataset[large]["image"]
    own = file.read_bytes()
    file.write_bytes((Path(out) / dataset[small]["image"]).read_bytes())
    try:
        with pytest.raises(JobError, match="it has not the sha256 of its row; heal it by: latentmill repair"):
            dataset.image(large)
    finally:
        file.write_bytes(own)


def test_the_words_are_those_of_the_flags(prompts: str, out: str, tmp_path: Path):
    with pytest.raises(UsageError, match="unknown key 'stpes'"):
        latentmill.plan(prompts, out=out, stpes=3)
    with pytest.raises(UsageError, match="no manifest is named"):
        latentmill.run(out=out)
    with pytest.raises(JobError, match="has no plan"):
        latentmill.open_dataset(str(tmp_path))
    assert latentmill.Engine is Engine
    with pytest.raises(AttributeError):
        _ = latentmill.unknown
