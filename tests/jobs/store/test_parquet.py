"""Parquet in memory is read so that the process can end at any time afterwards."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.store import parquet as parquet_module
from latentmill.jobs.store.parquet import OversizeError, read_parquet

ROOT = Path(__file__).parents[3]
READ_AND_END = (
    "import sys; from latentmill.jobs.store.parquet import read_parquet; read_parquet(sys.stdin.buffer.read())"
)


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_the_whole_table_or_some_columns_with_the_metadata() -> None:
    table = pa.table({"number": [1, 2, None], "text": ["a", "", "c"]}).replace_schema_metadata({"key": "value"})
    read = read_parquet(parquet(table))
    assert read.equals(table, check_metadata=True)
    assert read_parquet(parquet(table), ["text"]).column_names == ["text"]


@pytest.mark.slow
def test_a_process_that_reads_and_ends_is_not_aborted() -> None:
    data = parquet(pa.table({"number": list(range(100)), "text": ["x"] * 100}))
    for _ in range(12):  # the scanner of pyarrow aborts about every third
        subprocess.run([sys.executable, "-c", READ_AND_END], input=data, cwd=ROOT, check=True, timeout=60)


def test_nobody_reads_by_the_scanner() -> None:
    readers = [path for path in (ROOT / "jobs").rglob("*.py") if "pq.read_table(" in path.read_text()]
    assert readers == []


def test_a_dictionary_is_counted_before_it_is_unfolded() -> None:
    """One text of a mebibyte for 200 rows, beside numbers: 200 MiB out of a few kilobytes."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["x" * (1 << 20)]))
    sink = io.BytesIO()
    pq.write_table(pa.table({"number": list(range(200)), "text": texts}), sink, compression="zstd", store_schema=False)
    with pytest.raises(OversizeError, match="unpacks to 209,716,800 bytes, and at most 2,000,000"):
        read_parquet(sink.getvalue(), max_rows=200, max_bytes=2 * 10**6)
    with pytest.raises(OversizeError, match="has 200 rows, and at most 199"):
        read_parquet(sink.getvalue(), max_rows=199, max_bytes=10**9)
    assert read_parquet(sink.getvalue(), ["number"], max_rows=200, max_bytes=10**6).num_rows == 200
    assert read_parquet(sink.getvalue(), max_rows=200, max_bytes=10**9).column("text").type == pa.string()


def test_what_is_counted_is_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table(
        {
            "text": ["a", None, "a", ""],
            "bytes": pa.array([b"1", b"2", None, b""], pa.large_binary()),
            "number": pa.array([1, None, 3, 4], pa.uint16()),
            "list": [["x"], None, [], ["y", None]],
            "flag": [True, False, None, True],
        }
    ).replace_schema_metadata({"key": "value"})
    plain = read_parquet(parquet(table))
    monkeypatch.setattr(parquet_module, "_UNCOUNTED_BYTES", 0)
    assert read_parquet(parquet(table), max_bytes=10**6).equals(plain, check_metadata=True)
    assert read_parquet(parquet(table), ["number", "text"], max_bytes=10**6).equals(plain.select(["number", "text"]))
