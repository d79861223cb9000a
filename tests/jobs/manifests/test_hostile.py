"""Manifests made to cost time or memory, or to be no file at all: one line each, at once."""

from __future__ import annotations

import gzip
import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import csv_reader, readers
from latentmill.jobs.manifests.fields import FIELDS, FieldError
from latentmill.jobs.manifests.manifest import open_manifest

WIDE = 60_000


def rows(path):
    return [batch for source in open_manifest([str(path)]).sources for batch in source.batches()]


def write_wide(path):
    names = [f"c{number}" for number in range(WIDE)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [1] for name in ["prompt", *names]}), path)
    elif path.suffix in {".json", ".jsonl"}:
        record = json.dumps({"prompt": "a", **dict.fromkeys(names, 1)})
        path.write_text(f"[{record}]" if path.suffix == ".json" else record)
    else:
        path.write_text(("\t" if path.suffix == ".tsv" else ",").join(["prompt", *names]) + "\n")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_thousands_of_columns_are_refused_before_they_cost_time(tmp_path, suffix):
    path = tmp_path / f"wide.{suffix}"
    write_wide(path)
    started = time.process_time()
    with pytest.raises(UsageError, match="256"):
        rows(path)
    assert time.process_time() - started < 5  # it took two minutes


def test_blank_lines_by_the_million_are_refused_and_those_between_blocks_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BLANK_LINES", 1_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 256)
    with gzip.open(tmp_path / "m.txt.gz", "wb") as file:
        file.write(b"a\n" + b" \n\t\n\r\n\n" * 1_000)
    for name in ("m.csv", "m.jsonl", "m.txt"):
        start = {"m.csv": "prompt\na", "m.jsonl": '{"prompt":"a"}', "m.txt": "a"}[name]
        (tmp_path / name).write_text(start + "\n" * 2_000)
    for name in ("m.txt.gz", "m.csv", "m.jsonl", "m.txt"):
        with pytest.raises(
            UsageError, match=r"1,\d\d\d blank lines up to here, [012] with text; remove the blank ones"
        ):
            rows(tmp_path / name)
    (tmp_path / "fine.txt").write_text("a prompt\n\n\n\n" * 1_000)
    assert sum(map(len, rows(tmp_path / "fine.txt"))) == 1_000


def test_a_record_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_reader, "MAX_RECORD_BYTES", 1_000)
    for start in ("", "prompt\nfine\n"):
        (tmp_path / "m.csv").write_text(start + '"a","\n' * 1_000)
        with pytest.raises(UsageError, match="record of more than 1,000 bytes"):
            rows(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("prompt\n" + '"a\nb"\n' * 1_000)
    assert sum(map(len, rows(tmp_path / "m.csv"))) == 1_000


@pytest.mark.parametrize(
    ("name", "words"),
    [("fifo", "is a pipe"), ("dangling", "is a broken link"), ("loop", "is a broken link"), ("device", "is a device")],
)
def test_what_is_no_file_is_named_and_not_opened(tmp_path, name, words):
    path = tmp_path / f"{name}.txt"
    if name == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "device": "/dev/zero"}[name])
    with pytest.raises(UsageError, match=words):
        open_manifest([str(path)])


@pytest.mark.parametrize(
    "value",
    [int("9" * 4_000), -(10**4_000), float("nan"), float("inf"), 1e300, "1e400", "nan"],
    ids=["4,000 digits", "minus 4,000 digits", "NaN", "Infinity", "1e300", "text 1e400", "text nan"],
)
def test_numbers_beyond_all_limits_are_faults_of_their_field(value):
    for name in ("seed", "guidance_scale", "width"):
        with pytest.raises(FieldError, match=name):
            FIELDS[name].parse(value)


def test_deep_json_is_a_bad_row_of_lines_and_one_line_for_an_array(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "m.jsonl").write_text(f'{{"prompt":"a","x":{deep}}}\n{{"prompt":"b","x":{"[" * 500}1{"]" * 500}}}\n')
    (batch,) = rows(tmp_path / "m.jsonl")
    assert batch.faults == {0: "the line is nested too deeply; flatten it"}
    (tmp_path / "m.json").write_text(f'[{{"prompt":"a","x":{deep}}}]')
    with pytest.raises(UsageError, match="row 1 that is nested too deeply"):
        rows(tmp_path / "m.json")
