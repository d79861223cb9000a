"""Parquet with pictures in it, as DuckDB, polars, pandas and Ray Data read it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image

from latentmill.jobs.errors import JobError
from latentmill.jobs.exports.export import export
from latentmill.jobs.exports.spec import make_export_spec
from tests.jobs.exports.conftest import Write, digests
from tests.jobs.exports.consumers import told_by

READ_BY_RAY = """
import io, json, ray, sys
from PIL import Image
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
rows = ray.data.read_parquet(sys.argv[1]).take_all()
print(json.dumps(sorted([row["sample_id"], Image.open(io.BytesIO(row["image"]["bytes"])).size] for row in rows)))
"""


@pytest.fixture
def files(write: Write, tmp_path: Path) -> Path:
    write("parquet", shard_size="2")
    return tmp_path / "export/data"


def test_duckdb_polars_and_pandas_read_rows_and_pictures(files: Path, published: Path, ok: list[dict[str, Any]]):
    expected = [(row["sample_id"], row["prompt"], (published / row["image"]).read_bytes()) for row in ok]
    by_duckdb = duckdb.sql(f"select sample_id, prompt, image.bytes from '{files}/*.parquet' order by sample_id")
    assert by_duckdb.fetchall() == expected
    by_polars = pl.scan_parquet(files).select("sample_id", "prompt", pl.col("image").struct.field("bytes")).collect()
    assert by_polars.rows() == expected
    by_pandas = pd.read_parquet(files)
    assert [image["bytes"] for image in by_pandas["image"]] == [data for *_, data in expected]
    assert [image["path"] for image in by_pandas["image"]] == [f"{row['sample_id']}.png" for row in ok]
    with Image.open(io.BytesIO(by_pandas["image"][0]["bytes"])) as image:
        assert np.asarray(image).shape == (64, 64, 3)


@pytest.mark.cluster
def test_ray_data_reads_them(files: Path, ok: list[dict[str, Any]]):
    assert told_by(READ_BY_RAY, files) == [[row["sample_id"], [64, 64]] for row in ok]


@pytest.mark.cluster
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # Ray 2.60 uses its own old settings
def test_an_export_on_ray_has_the_same_bytes_and_tells_the_same_errors(
    write: Write, published: Path, ok: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write("webdataset", "calm", shard_size="2")
    summary = write("webdataset", "on-ray", shard_size="2", executor="ray")  # a relative path, as a user types it
    assert summary.written == 3
    assert digests(tmp_path / "on-ray") == digests(tmp_path / "calm")
    (tmp_path / "on-ray/000000.tar").unlink()  # as if it had been killed: two shards are open, and it is not finished
    (tmp_path / "on-ray/_export/shards/000/00001.json").unlink()
    (tmp_path / "on-ray/_export/export.json").unlink()
    again = write("webdataset", "on-ray", shard_size="2", executor="ray", verify=True)
    assert (again.written, again.shards) == (2, 3)
    assert digests(tmp_path / "on-ray") == digests(tmp_path / "calm")
    picture = published / ok[3]["image"]
    data = picture.read_bytes()
    try:
        picture.write_bytes(data[:-1] + b"?")
        spec = make_export_spec({"to": "jsonl", "out": "damaged", "executor": "ray", "shard_size": "2"})
        with pytest.raises(JobError, match=rf"{ok[3]['image']} .*not the sha256 of its row; .*latentmill repair"):
            export(str(published), spec)
    finally:
        picture.write_bytes(data)
