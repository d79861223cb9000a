"""Readers: every format, plain and compressed, in several files, from several places, with the same rows."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import parquet_reader, readers
from latentmill.jobs.manifests.manifest import open_manifest

ROWS = [
    {"prompt": "a red circle", "seed": 3, "tag": "x"},
    {"prompt": 'quotes "and", commas\nand a line', "seed": None, "tag": "ünï"},
    {"prompt": "", "seed": 5, "tag": "z"},
]


def table_bytes(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def encode(rows, suffix):
    if suffix == "parquet":
        return table_bytes(pa.Table.from_pylist(rows))
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if suffix == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read(*patterns):
    manifest = open_manifest([str(pattern) for pattern in patterns])
    lines, faults, columns = [], {}, {}
    for source in manifest.sources:
        for batch in source.batches():
            faults |= {len(lines) + index: reason for index, reason in batch.faults.items()}
            lines += batch.lines.tolist()
            for name, values in batch.columns.items():
                columns.setdefault(name, []).extend(values if isinstance(values, list) else values.to_pylist())
    return manifest, lines, columns, faults


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    data = encode(ROWS, suffix.removesuffix(".gz"))
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    manifest, lines, columns, faults = read(path)
    assert manifest.own == ("prompt", "seed")
    assert manifest.carried == pa.schema([("tag", pa.string())])
    assert lines == [1, 2, 3]
    assert columns["prompt"] == [row["prompt"] for row in ROWS]
    assert [None if seed is None else int(seed) for seed in columns["seed"]] == [3, None, 5]
    assert columns["tag"] == ["x", "ünï", "z"]
    assert not faults


@pytest.mark.parametrize("name", ["m.txt", "m.txt.gz"])
def test_lines_of_text_keep_their_numbers_and_their_spaces(tmp_path, name):
    data = "\ufeffone\r\n\n  two  \n \t \nthree".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    _, lines, columns, _ = read(tmp_path / name)
    assert lines == [1, 3, 5]
    assert columns["prompt"] == ["one", "  two  ", "three"]


def test_several_files_and_globs_are_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}\n")
    (tmp_path / "[odd].txt").write_text("brackets\n")
    _, _, columns, _ = read(tmp_path / "c.txt", tmp_path / "[a-b].txt", tmp_path / "[odd].txt")
    assert columns["prompt"] == ["prompt c", "prompt a", "prompt b", "brackets"]


def test_lines_are_whole_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 7)
    prompts = [f"prompt number {number} é" for number in range(50)]
    (tmp_path / "m.txt").write_text("\n".join(prompts), encoding="utf-8")
    _, lines, columns, _ = read(tmp_path / "m.txt")
    assert columns["prompt"] == prompts
    assert lines == list(range(1, 51))


def test_an_overlong_line_is_one_bad_row_and_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    for suffix, good in (("txt", "fine"), ("jsonl", '{"prompt":"fine"}'), ("csv", "fine")):
        head = "prompt\n" if suffix == "csv" else ""
        (tmp_path / f"m.{suffix}").write_text(f"{head}{good}\n{'x' * 1000}\n{good}\n{'y' * 99}")
        _, lines, columns, faults = read(tmp_path / f"m.{suffix}")
        assert lines == [1, 2, 3, 4]
        assert columns["prompt"][0] == columns["prompt"][2] == "fine"
        assert "bytes" in faults[1]
        assert 0 not in faults
        assert 2 not in faults


def test_a_json_column_has_one_type_or_is_json_text(tmp_path):
    rows = [
        {"prompt": "a", "i": 1, "f": 1, "s": "x", "b": True, "m": 1, "n": None, "big": 2**70, "l": [1, {"k": "é"}]},
        {"prompt": "b", "i": 2**60, "f": 0.5, "s": None, "b": False, "m": "one", "n": None, "big": 1},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest, _, columns, _ = read(tmp_path / "m.jsonl")
    types = {field.name: str(field.type) for field in manifest.carried}
    assert types == {
        "i": "int64",
        "f": "double",
        "s": "string",
        "b": "bool",
        "m": "string",
        "n": "null",
        "big": "string",
        "l": "string",
    }
    assert columns["i"] == [1, 2**60]
    assert columns["m"] == ["1", '"one"']
    assert columns["big"] == [str(2**70), "1"]
    assert json.loads(columns["l"][0]) == [1, {"k": "é"}]
    assert columns["l"][1] is None


def test_bad_lines_of_json_and_csv_are_bad_rows_only(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"prompt":"a"}\n{"prompt":\n[1]\n\n' + "[" * 100_000 + '\n{"prompt":"b"}\n')
    _, lines, columns, faults = read(tmp_path / "m.jsonl")
    assert lines == [1, 2, 3, 5, 6]
    assert sorted(faults) == [1, 2, 3]
    assert columns["prompt"][4] == "b"
    (tmp_path / "m.csv").write_text("prompt,tag\na,1\nb\nc,2,3\nd,4\n")
    _, lines, columns, faults = read(tmp_path / "m.csv")
    assert lines == [1, 2, 3, 4]
    assert sorted(faults) == [1, 2]
    assert "has 3 values, the header has 2" in faults[2]
    assert columns["prompt"][3] == "d"


def test_windows_line_ends_are_no_data_but_stay_inside_quotes(tmp_path):
    (tmp_path / "m.csv").write_bytes(b'prompt,tag\r\na,"x\r\ny"\r\nb,z\r\n')
    (tmp_path / "n.jsonl").write_bytes(b'{"prompt":"c","tag":"w"}\r\n\r\n')
    _, _, columns, faults = read(tmp_path / "m.csv", tmp_path / "n.jsonl")
    assert (columns["prompt"], columns["tag"], faults) == (["a", "b", "c"], ["x\r\ny", "z", "w"], {})


def test_an_unclosed_quote_costs_rows_but_no_memory_and_is_said(tmp_path):
    (tmp_path / "m.csv").write_text('prompt\nfine\n"never closed\n' + "x" * 1000 + "\n" * 3 + ("y" * 1000 + "\n") * 200)
    _, _, columns, faults = read(tmp_path / "m.csv")
    assert columns["prompt"][0] == "fine"
    assert "close the quotes" in faults[1]


def test_parquet_types_are_carried_as_they_are(tmp_path):
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"]).dictionary_encode(),
            "at": pa.array([when, None], pa.timestamp("us", "UTC")),
            "vector": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())),
            "info": pa.array([{"k": 1, "s": "x"}, None]),
            "kind": pa.array(["p", "q"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    manifest, _, columns, _ = read(tmp_path / "m.parquet")
    assert columns["prompt"] == ["a", "b"]
    assert columns["at"] == [when, None]
    assert columns["vector"] == [[1.0, 2.0], None]
    assert columns["info"] == [{"k": 1, "s": "x"}, None]
    assert manifest.carried.field("kind").type == pa.string()
    assert manifest.carried.field("at").type == pa.timestamp("us", "UTC")


BOMB = """
import re, sys
from pathlib import Path
from latentmill.jobs.manifests.manifest import open_manifest
rows = bad = 0
for source in open_manifest([sys.argv[1]]).sources:
    for batch in source.batches():
        rows += len(batch); bad += len(batch.faults)
print(rows, bad, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.long
def test_a_tiny_parquet_file_that_decodes_to_a_gigabyte_is_read_in_little_memory(tmp_path):
    table = pa.table({"prompt": ["x" * (1 << 20) + "y"] * 1000 + ["fine"] * 24})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2000
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path / "bomb.parquet")], capture_output=True, text=True, check=True
    )
    rows, bad, megabytes = map(int, done.stdout.split())
    assert (rows, bad) == (1024, 1000)
    assert megabytes < 500


def test_a_parquet_page_that_expands_beyond_reason_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_reader, "MAX_CHUNK_BYTES", 1 << 20)
    table = pa.table({"prompt": [f"{number:04d}" + "x" * 8000 for number in range(500)]})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UsageError, match=r"expands to 4,\d+,\d+ .*limit is 1,048,576"):
        read(tmp_path / "bomb.parquet")


def test_object_stores_and_memory_are_read_like_disks(tmp_path, s3):
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    fs.pipe_file(f"{s3}/in/a.txt", b"one\ntwo\n")
    fs.pipe_file(f"{s3}/in/b.parquet", encode(ROWS[:1], "parquet"))
    manifest, _, columns, _ = read(f"{s3}/in/*")
    assert columns["prompt"] == ["one", "two", "a red circle"]
    assert [source.name for source in manifest.sources] == [f"{s3}/in/a.txt", f"{s3}/in/b.parquet"]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/manifest-test/x.txt", b"three\n")
    try:
        assert read("memory://manifest-test/x.txt")[2]["prompt"] == ["three"]
    finally:
        memory.rm("/manifest-test", recursive=True)


def bad_files(tmp_path):
    def put(name, data):
        (tmp_path / name).write_bytes(data)
        return name

    def parquet(**columns):
        return table_bytes(pa.table({"prompt": ["a"]} | columns))

    whole = encode(ROWS, "parquet")
    pairs = pa.array([[("k", 1)]], pa.map_("string", "int8"))
    return {
        "missing.txt": ("missing.txt", ["does not exist"]),
        "glob": ("nothing*.txt", ["matches no file"]),
        "folder": (".", ["is a folder", "glob"]),
        "empty": (put("empty.txt", b""), ["is empty"]),
        "suffix": (put("m.docx", b"x"), ["unknown kind", ".parquet"]),
        "parquet.gz": (put("m.parquet.gz", b"x"), ["unknown kind"]),
        "utf16": (put("u.txt", "prompt".encode("utf-16")), ["UTF-16", "UTF-8"]),
        "csv column": (put("c.csv", b"Prompt,tag\na,b\n"), ["no column 'prompt', did you mean 'Prompt'", "Rename"]),
        "jsonl column": (put("j.jsonl", b'{"text":"a"}\n'), ["no column 'prompt'", "'text'"]),
        "parquet column": (put("p.parquet", table_bytes(pa.table({"x": [1]}))), ["no column 'prompt'", "'x'"]),
        "twice": (put("t.csv", b"prompt,a,a\nx,y,z\n"), ["'a' twice"]),
        "gzip": (put("g.txt.gz", b"plain"), ["not a whole gzip file"]),
        "cut gzip": (put("h.txt.gz", gzip.compress(b"a\n" * 1000)[:-9]), ["not a whole gzip file"]),
        "cut parquet": (put("q.parquet", whole[:-9]), ["not a whole Parquet file"]),
        "type": (put("y.parquet", parquet(seed=["1"])), ["seed as string", "numbers"]),
        "prompt type": (put("z.parquet", parquet(prompt=[1])), ["prompt as int64", "text"]),
        "map": (put("m.parquet", parquet(m=pairs)), ["'m' as map", "text"]),
        "protocol": ("http://h/x.txt", ["http"]),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "missing.txt", "glob", "folder", "empty", "suffix", "parquet.gz", "utf16", "csv column", "jsonl column",
    "parquet column", "twice", "gzip", "cut gzip", "cut parquet", "type", "prompt type", "map", "protocol",
])  # fmt: skip
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, case):
    name, words = bad_files(tmp_path)[case]
    with pytest.raises(UsageError) as caught:
        read(name if "://" in name else tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message
    assert name.strip(".") in message
    for word in words:
        assert word in message


def test_one_column_with_two_types_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,tag\na,b\n")
    (tmp_path / "b.jsonl").write_text('{"prompt":"a","tag":1}\n')
    with pytest.raises(UsageError, match=r"'tag' is string in .*a\.csv but int64 in .*b\.jsonl"):
        read(tmp_path / "a.csv", tmp_path / "b.jsonl")


def test_an_unreachable_bucket_is_one_line(monkeypatch, s3):
    with pytest.raises(UsageError) as caught:
        read(f"{s3.rsplit('/', 2)[0]}/no-such-bucket-here/x.txt")
    assert "\n" not in str(caught.value)
    assert "no-such-bucket-here" in str(caught.value)


def test_too_many_keys_are_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"prompt": "a", f"k{n}": 1}) + "\n" for n in range(300)))
    with pytest.raises(UsageError, match="more than 256 different keys"):
        read(tmp_path / "m.jsonl")
