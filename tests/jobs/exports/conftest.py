"""One small published dataset for all tests of exports, and a way to write them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from latentmill.jobs.exports.export import ExportSummary, export
from latentmill.jobs.exports.spec import make_export_spec
from tests.jobs.driver import job_spec, run

PROMPTS = [
    "one",
    'two, "quoted"\nand more',
    "some nsfw",
    "some poison",
    "=cmd()|five",
    "six ünïcode 🦆",
    "seven",
    "eight",
]
"""One is flagged, one fails, six are ok."""

Write = Callable[..., ExportSummary]


@pytest.fixture(scope="session")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job: eight samples, of which seven have a picture, with columns of the manifest's own."""
    folder = tmp_path_factory.mktemp("exports")
    columns = {
        "prompt": PROMPTS,
        "id": ["a", "b", "c", "d", "e", "a", "b", "f"],
        "clip_score": pa.array([0.1, 0.2, 0.3, None, 0.5, 0.6, 0.7, 0.8], pa.float32()),
        "file_name": [f"mine-{number}" for number in range(8)],
        "tags": [["red", "round"], [], None, ["x"], ["y"], ["z"], ["z"], ["z"]],
    }
    pq.write_table(pa.table(columns), folder / "prompts.parquet")
    out = folder / "out"
    run(job_spec(tiny_model, folder / "prompts.parquet", out, on_flagged="keep"))
    return out


@pytest.fixture(scope="session")
def rows(published: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.dataset.dataset(str(published / "dataset")).to_table().to_pylist()
    return found


@pytest.fixture(scope="session")
def ok(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


@pytest.fixture
def write(published: Path, tmp_path: Path) -> Write:
    """Writes an export, by default into tmp_path/export."""

    def write(to: str, out: Path | str | None = None, **settings: Any) -> ExportSummary:
        spec = make_export_spec({"to": to, "out": str(out or tmp_path / "export"), **settings})
        return export(str(published), spec)

    return write


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file that a reader may see."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)
    }
