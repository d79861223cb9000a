"""Pictures as files, and tables that name them: CSV, JSON lines, COCO captions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from latentmill.jobs.exports import tables
from latentmill.jobs.exports.json_values import json_rows, to_json
from tests.jobs.exports.conftest import Write


def test_csv_is_read_by_whoever_reads_csv(write: Write, published: Path, ok: list[dict[str, Any]], tmp_path: Path):
    write("csv", shard_size="4")
    files = sorted((tmp_path / "export").glob("*.csv"))
    assert [path.name for path in files] == ["train-00000-of-00002.csv", "train-00001-of-00002.csv"]
    prompts = [row["prompt"] if row["prompt"][0] != "=" else f"'{row['prompt']}" for row in ok]
    by_pandas = pd.concat([pd.read_csv(path, dtype={"sample_id": str}) for path in files])
    by_polars = pl.concat([pl.read_csv(path, schema_overrides={"sample_id": pl.String}) for path in files])
    by_duckdb = duckdb.sql(
        f"select prompt, seed from read_csv('{tmp_path}/export/*.csv') order by sample_id"
    ).fetchall()
    assert by_pandas["prompt"].tolist() == by_polars["prompt"].to_list() == [row[0] for row in by_duckdb] == prompts
    assert by_pandas["seed"].tolist() == [row[1] for row in by_duckdb] == [row["seed"] for row in ok]
    assert [json.loads(tags) for tags in by_polars["tags"]] == [row["tags"] for row in ok]
    for place, row in zip(by_pandas["file_name"], ok, strict=True):
        assert (tmp_path / "export" / place).read_bytes() == (published / row["image"]).read_bytes()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\n=x", "＝1"])
def test_no_text_in_csv_is_run_as_a_formula(text: str):
    told = tables.csv(pa.table({text: [text, "plain", "", None], "number": [-1, 2, 3, None]})).decode()
    head, *rows = csv.reader(told.splitlines(keepends=True))
    assert head == [f"'{text}", "number"]
    assert rows == [[f"'{text}", "-1"], ["plain", "2"], ["", "3"], ["", ""]]
    assert told.endswith('"",3\n,\n')  # an empty text is told from a null


def test_json_lines_hold_every_column_as_it_is(write: Write, ok: list[dict[str, Any]], tmp_path: Path):
    write("jsonl")
    (file,) = (tmp_path / "export").glob("*.jsonl")
    told = [json.loads(line) for line in file.read_text().splitlines()]
    names = ok[0].keys() - {"image", "file_name"}
    assert [{name: row[name] for name in names} for row in told] == [{name: row[name] for name in names} for row in ok]
    by_duckdb = duckdb.sql(f"select prompt, tags from read_json('{file}')").fetchall()
    assert by_duckdb == [(row["prompt"], row["tags"]) for row in ok]


def test_what_json_has_no_word_for_is_text():
    columns = {
        "half": pa.array([float("nan"), float("inf")]),
        "bytes": pa.array([b"\x00\xff", None]),
        "time": pa.array([1, None], pa.timestamp("ns", "UTC")),
        "deep": pa.array([{"a": [float("-inf")], "b": None}, None]),
        "number": pa.array([1, 2]).cast(pa.decimal128(30, 2)),
    }
    first, second = (json.loads(to_json(row)) for row in json_rows(pa.table(columns)))
    assert first["half"] == "nan"
    assert (first["bytes"], first["time"]) == ("AP8=", "1970-01-01 00:00:00.000000001Z")
    assert (first["deep"], first["number"]) == ({"a": ["-inf"], "b": None}, "1.00")
    assert second == {"half": "inf", "bytes": None, "time": None, "deep": None, "number": "2.00"}


def test_coco_captions_name_every_picture_once(write: Write, published: Path, ok: list[dict[str, Any]], tmp_path: Path):
    write("coco-captions", shard_size="4", image_format="jpeg")
    told = json.loads((tmp_path / "export/annotations/captions_train.json").read_text())
    images = {image["id"]: image for image in told["images"]}
    captions = {annotation["image_id"]: annotation["caption"] for annotation in told["annotations"]}
    assert images.keys() == captions.keys() == {int(row["sample_id"]) + 1 for row in ok}
    assert list(captions.values()) == [row["prompt"] for row in ok]
    assert [image["sha256"] for image in images.values()] == [row["sha256"] for row in ok]
    files = {path.relative_to(tmp_path / "export/images").as_posix() for path in (tmp_path / "export").rglob("*.jpg")}
    assert {image["file_name"] for image in images.values()} == files
