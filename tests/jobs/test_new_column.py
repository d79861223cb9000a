"""A column is declared once: one more entry in the table, and record, dataset, metadata, verify and docs have it."""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.job import Job, open_job
from latentmill.jobs.ledger.ledger import record_path
from latentmill.jobs.ledger.records import encode_record
from latentmill.jobs.outputs.publish import load_publication
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.plans import columns
from latentmill.jobs.plans.columns import COLUMNS, Column, Source, formats, own_fields
from tests.jobs.driver import job_spec, run

ROOT = Path(__file__).parents[2]
NEW: dict[Source, Callable[[Any], Any]] = {
    "sample": lambda sample: len(sample.request.prompt),
    "job": lambda plan: plan.settings.chunk_size,
    "result": lambda result: result.batch_slot + 100,
}
"""A value by source; each is a column `new_SOURCE`."""


def at_least_100(row: columns.Row, _: object) -> str | None:
    """At least 100."""
    return None if row["new_result"] >= 100 else f"its new_result is {row['new_result']}"


def declared(source: Source, since: int) -> Column:
    rule = at_least_100 if source == "result" else None
    return Column(
        name=f"new_{source}",
        type=pa.int32(),
        text=f"New of {source}.",
        source=source,
        value=NEW[source],
        rule=rule,
        since=since,
    )


@pytest.fixture
def job(tiny_model: Path, manifest: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A finished job of the format after today's, which has the new columns."""
    since = formats()[-1] + 1
    monkeypatch.setattr(columns, "COLUMNS", (*COLUMNS, *(declared(source, since) for source in NEW)))
    spec = job_spec(tiny_model, manifest(4), tmp_path / "out")
    assert run(spec).exit_code == 0
    return open_job(spec.out)


def forge(job: Job, **changes: object) -> None:
    """The first record with other values, sealed as a worker seals it."""
    record = job.ledger.read(0)
    assert record is not None
    rows = [row | changes for row in record.table.to_pylist()]
    data = encode_record(
        rows,
        job.ledger.schema,
        chunk=0,
        attempt=record.attempt,
        plan_hash=record.plan_hash,
        execution_class=record.execution_class,
        versions={},
    )
    job.storage.write(record_path(0), data)


def test_it_is_in_the_record_the_dataset_and_their_metadata(job: Job) -> None:
    record, publication = job.ledger.read(0), load_publication(job)
    assert record is not None
    assert publication is not None
    part = pq.read_table(f"{job.storage.url}/{publication.parts[0].path}")
    prompts = part.column("prompt").to_pylist()
    assert part.column("new_sample").to_pylist() == [len(prompt) for prompt in prompts]
    assert part.column("new_job").to_pylist() == [2] * 4
    assert part.column("new_result").to_pylist() == [100, 101, 100, 101]
    assert part.schema.field("new_result").type == pa.int32()
    assert record.table.equals(part.slice(0, 2).replace_schema_metadata(None))
    assert (record.metadata["new_job"], part.schema.metadata[b"latentmill.new_job"]) == ("2", b"2")
    assert dict(publication.schema)["new_job"] == "int32"
    assert job.plan.format_version == formats()[-1]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("new_sample", "new_sample not as the plan asked for"),
        ("new_job", "new_job not as the plan asked for"),
        ("new_result", "its new_result is 1"),
    ],
)
def test_verify_holds_each_row_to_it(name: str, fault: str, job: Job) -> None:
    assert verify(job.storage.url).defects == ()
    forge(job, **{name: 1})
    defects = verify(job.storage.url).defects
    assert {defect.kind for defect in defects} == {"row-wrong"}
    assert all(fault in defect.detail for defect in defects)
    assert len(defects) == 2


@pytest.mark.usefixtures("job")
def test_the_docs_have_its_line() -> None:
    table = runpy.run_path(str(ROOT / "docs" / "generate.py"))["columns"]()
    assert "| `new_sample` | int32 | sample | New of sample. | as planned |" in table
    assert "| `new_result` | int32 | result | New of result. | At least 100 |" in table


def test_every_column_says_where_it_comes_from() -> None:
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    for column in COLUMNS:
        assert column.text.endswith("."), column.name
        assert (column.value is None) == (column.source in {"postprocess", "storage"}), column.name


@pytest.mark.parametrize(
    ("version", "digest"), [(2, "4cb244c56f51226b"), (3, "1f91cc123bb6ed39"), (4, "e112f0eee6f1bdbc")]
)
def test_the_columns_of_a_format_that_is_in_use_never_change(version: int, digest: str) -> None:
    """A new column says `since=` the next format, or outputs that lie somewhere could not be read any more."""
    schema = "\n".join(f"{field.name} {field.type}" for field in own_fields(version))
    assert hashlib.sha256(schema.encode()).hexdigest()[:16] == digest
