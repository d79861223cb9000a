"""Parquet in memory is read so that the process can end at any time afterwards."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.store.parquet import read_parquet

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
