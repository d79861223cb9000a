"""What people type to read a dataset gives exactly the published rows, and the pictures with their captions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset
import pytest
from PIL import Image

from latentmill.jobs.outputs.captions import captions_path
from latentmill.jobs.show.report import report
from tests.jobs.driver import job_spec, read_dataset, run

PROMPTS = ["one", 'two, "quoted"', "some nsfw", "some poison", "five"]
READ_BY_RAY = """
import sys, ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
print(sorted(row["sample_id"] for row in ray.data.read_parquet(sys.argv[1]).take_all()))
"""


@pytest.fixture(scope="module")
def out(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job with a failed and a flagged sample, contact sheets, and a picture of an attempt that lost."""
    folder = tmp_path_factory.mktemp("loaders")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    out = folder / "out"
    run(job_spec(tiny_model, folder / "prompts.txt", out))
    report(str(out))
    lost = out / "images/00000/00000000-0123456789abcdef"
    lost.mkdir()
    Image.new("RGB", (64, 64), "red").save(lost / "00000000.png")
    return out


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(str(out / "dataset")).to_table().to_pylist()
    assert [row["prompt"] for row in rows] == PROMPTS
    assert len(rows) == read_dataset(str(out)).rows.num_rows
    return rows


def test_readers_of_parquet_take_the_folder_as_it_is(out: Path, rows: list[dict[str, Any]]) -> None:
    ids = [row["sample_id"] for row in rows]
    assert pd.read_parquet(out / "dataset")["sample_id"].tolist() == ids
    assert pl.read_parquet(out / "dataset").to_dicts() == rows
    assert pl.scan_parquet(out / "dataset").collect().to_dicts() == rows
    found = duckdb.sql(f"select sample_id, prompt from '{out}/dataset/*.parquet' order by sample_id").fetchall()
    assert found == [(row["sample_id"], row["prompt"]) for row in rows]


@pytest.mark.cluster
def test_ray_data_takes_the_folder_as_it_is(out: Path, rows: list[dict[str, Any]]) -> None:
    command = [sys.executable, "-c", READ_BY_RAY, str(out / "dataset")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip().splitlines()[-1] == str([row["sample_id"] for row in rows])


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`datasets.load_dataset`, offline, with a cache of this test's own."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import datasets

    return lambda *place, **where: datasets.load_dataset(*place, **where, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("place", ["output", "imagefolder of the output", "imagefolder of its pictures"])
def test_hugging_face_shows_the_pictures_with_their_captions(
    place: str, out: Path, rows: list[dict[str, Any]], load: Callable[..., Any]
) -> None:
    match place:
        case "output":
            loaded = load(str(out))
        case "imagefolder of the output":
            loaded = load("imagefolder", data_dir=str(out))
        case _:
            loaded = load("imagefolder", data_dir=str(out / "images"))
    assert list(loaded) == ["train"]
    pictured = [row for row in rows if row["image"] is not None]
    assert [(row["sample_id"], row["prompt"], row["seed"], row["status"]) for row in loaded["train"]] == [
        (row["sample_id"], row["prompt"], row["seed"], row["status"]) for row in pictured
    ]
    for found, row in zip(loaded["train"], pictured, strict=True):
        assert np.array_equal(np.asarray(found["image"]), np.asarray(Image.open(out / row["image"])))
    assert (out / captions_path(0)).is_file()
