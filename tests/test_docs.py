"""The numbers that docs/ names are those of the code, and a limit is one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentmill import cli
from latentmill.jobs import job_file
from latentmill.jobs.compare import compare
from latentmill.jobs.errors import UsageError
from latentmill.jobs.manifests import (
    axis_values,
    csv_reader,
    manifest,
    parquet_reader,
    readers,
    templates,
    wildcards,
)
from latentmill.jobs.manifests.manifest import open_manifest
from latentmill.jobs.manifests.templates import TemplateError
from latentmill.jobs.outputs import latest, score
from latentmill.jobs.plans import grid, job_models
from latentmill.jobs.plans.job_models import named_in_rows
from latentmill.jobs.scores import duplicates
from latentmill.jobs.show import comparison, gallery, page, report, sheet_pages

DOCS = Path(__file__).parents[1] / "docs"
MiB = 1 << 20

LIMITS: dict[str, tuple[str, ...]] = {
    "a row or a value": (f"{readers.MAX_ROW_BYTES // MiB} MiB",),
    "columns besides ours": (f"{readers.MAX_COLUMNS}",),
    "files of one manifest": (f"{manifest.MAX_FILES:,}",),
    "one CSV record": (f"{csv_reader.MAX_RECORD_BYTES // MiB} MiB",),
    "one column chunk of Parquet that expands more than a hundredfold": (
        f"{parquet_reader.MAX_CHUNK_BYTES // MiB} MiB",
    ),
    "blank lines, where there are ten or more for each line of text": (f"{readers.MAX_BLANK_LINES:,}",),
    "values of a sweep axis": (f"{axis_values.MAX_AXIS_VALUES:,}",),
    "a file of values": (f"{axis_values.MAX_VALUES_BYTES // MiB} MiB",),
    "samples of a job": (f"{grid.MAX_SAMPLES:,}",),
    "prompts of one template, with `--template dynamic-all`": (f"{templates.MAX_VARIANTS:,}",),
    "how deep a template is nested": (f"{templates.MAX_DEPTH}",),
    "wildcards of a job": (f"{wildcards.MAX_FILES:,} files", f"{wildcards.MAX_BYTES // MiB} MiB"),
    "a job file": (f"{job_file.MAX_JOB_FILE_BYTES:,} bytes",),
}
"""The table of limits in docs/settings.md, from the code."""

NAMED = {
    "report.md": [
        f"the first so many samples, {report.MAX_PICTURES:,} unless told",
        f"longest side, {report.THUMBNAIL} unless told",
        f"than this, {report.MAX_SHEETS} unless told",
        f"`report/data/rows-*.js` | {gallery.BLOCK_ROWS} rows each",
        f"long texts of {gallery.DETAIL_ROWS} rows each",
        f"their first {page.MAX_TEXT} characters",
        f"onto {sheet_pages._GRID_ROWS} by {sheet_pages._COLUMNS}",
    ],
    "compare.md": [
        f"`--top` (200, up to {compare.MAX_TOP:,})",
        f"at most {comparison._SIDE} pixels a side",
    ],
    "scores.md": [
        f"their batches of {score.BATCH};",
        f"the nearest {duplicates.MAX_PAIRS:,} are listed",
        f"more than {duplicates.MAX_COMPARISONS // 1_000_000} million comparisons",
    ],
    "settings.md": [f"instead, up to {job_models.MAX_MODELS} models"],
}


def test_the_table_of_limits_has_the_limits_of_the_code():
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    table = text.split("### Limits", 1)[1].split("The number of rows", 1)[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.MULTILINE))
    assert rows.keys() - {"what"} == LIMITS.keys()
    for what, parts in LIMITS.items():
        assert all(part in rows[what] for part in parts), what


@pytest.mark.parametrize("name", NAMED)
def test_a_page_names_the_numbers_of_the_code(name: str):
    text = (DOCS / name).read_text(encoding="utf-8")
    for words in NAMED[name]:
        assert words in text, words
    assert latest.MAX_DAYS == 100
    assert "in the hundred days before" in (DOCS / "compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("verb", "function"), [(cli.report, report.report), (cli.compare, compare.compare)])
def test_the_command_has_the_defaults_of_what_it_calls(verb: Callable[..., Any], function: Callable[..., Any]):
    given = {name: parameter.default for name, parameter in inspect.signature(verb).parameters.items()}
    own = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    shared = {name for name in given.keys() & own.keys() if own[name] is not inspect.Parameter.empty}
    assert {name: given[name] for name in shared} == {name: own[name] for name in shared}
    assert len(shared) >= 1


def test_files_beyond_a_limit_are_refused_by_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a cat\n")
    monkeypatch.setattr(manifest, "MAX_FILES", 2)
    with pytest.raises(UsageError, match="3 manifest files, the limit is 2; join them into fewer"):
        open_manifest([f"{tmp_path}/*.txt"])
    monkeypatch.setattr(wildcards, "MAX_FILES", 2)
    folder = wildcards.WildcardFolder(str(tmp_path))
    with pytest.raises(UsageError, match="has 3 files, the limit is 2"):
        folder.lines("0")
    monkeypatch.setattr(wildcards, "MAX_FILES", 3)
    monkeypatch.setattr(wildcards, "MAX_BYTES", 11)
    folder = wildcards.WildcardFolder(str(tmp_path))
    assert folder.lines("0") == ("a cat",)
    with pytest.raises(UsageError, match="more than 11 bytes; use fewer or shorter ones"):
        folder.lines("1")
    with pytest.raises(TemplateError):
        folder.lines("4")
    monkeypatch.setattr(axis_values, "MAX_VALUES_BYTES", 5)
    with pytest.raises(UsageError, match=r"0\.txt has more than 5 bytes; put its lines into the manifest"):
        job_file.resolve(None, {"sweep": [f"prompt=@{tmp_path}/0.txt"]})


def test_rows_that_name_too_many_models_are_refused_before_one_is_looked_for(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,model\n" + "".join(f"a,m{number}\n" for number in range(job_models.MAX_MODELS + 1)))
    with pytest.raises(UsageError, match="the column model names more than 256 models; split the manifest"):
        named_in_rows(open_manifest([str(path)]), "embedded")
