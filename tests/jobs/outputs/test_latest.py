"""Dated outputs: `{date}` in an output's name, one dataset for each, and a pointer to the newest whole one."""

from __future__ import annotations

import datetime
import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentmill.jobs.dated import DatedOutput, dated_output
from latentmill.jobs.errors import OutputConflictError, UsageError
from latentmill.jobs.job_file import resolve
from latentmill.jobs.outputs import latest
from latentmill.jobs.outputs.latest import Latest, point_to_latest
from latentmill.jobs.runner import RunSummary
from latentmill.jobs.show.views import show_run
from latentmill.jobs.spec import JobSpec
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.submission.portable import portable_job_file
from tests.jobs.driver import run
from tests.jobs.fakes import fake_engine

Manifest = Callable[..., Path]
MONDAY, TUESDAY, WEDNESDAY = (datetime.date(2026, 11, day) for day in (23, 24, 25))
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "watermark": "none", "chunk_size": 2, "batch_size": 2}


def dated_spec(model: Path, prompts: Path, out: str, day: datetime.date, **flags: Any) -> JobSpec:
    given = {"prompts": [str(prompts)], "model": str(model), "out": out, "executor": "inline", **SMALL, **flags}
    return resolve(None, given, today=day)


def pointer(parent: Path | str, name: str = "latest.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Storage.open(str(parent)).read(name))
    return found


def never(*_: object) -> Any:
    raise AssertionError("a model was loaded")


def test_each_night_has_its_dataset_and_the_pointer_follows(
    s3: str, tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    spec = dated_spec(tiny_model, manifest(3), f"{s3}/sweep/{{date}}", MONDAY)
    assert spec.out == f"{s3}/sweep/2026-11-23"
    summary = run(spec)
    assert (summary.exit_code, summary.generated) == (0, 3)
    first = pointer(f"{s3}/sweep")
    assert (first["out"], first["date"]) == (spec.out, "2026-11-23")
    assert first["counts"] == {"ok": 3, "flagged": 0, "failed": 0}
    assert datetime.datetime.fromisoformat(first["published_at"]).tzinfo is not None
    assert summary.latest == Latest(
        pointer=f"{s3}/sweep/latest.json", **{k: v for k, v in first.items() if k != "format"}
    )
    run(dated_spec(tiny_model, manifest(3), f"{s3}/sweep/{{date}}/", TUESDAY))
    assert pointer(f"{s3}/sweep")["date"] == "2026-11-24"
    beside = {path.split("/")[0] for path, _ in Storage.open(f"{s3}/sweep").list("")}
    assert beside == {"2026-11-23", "2026-11-24", "latest.json"}


def test_tonights_dataset_is_made_once_and_another_plan_is_refused(
    tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    out = f"{tmp_path}/sweep/{{date}}"
    run(dated_spec(tiny_model, manifest(2), out, MONDAY))
    (tmp_path / "sweep/latest.json").unlink()  # as if the driver had died before it
    again = run(dated_spec(tiny_model, manifest(2), out, MONDAY), engine_factory=never)
    assert (again.exit_code, again.generated) == (0, 0)
    assert pointer(tmp_path / "sweep")["out"] == f"{tmp_path}/sweep/2026-11-23"
    before = (tmp_path / "sweep/latest.json").stat().st_mtime_ns
    run(dated_spec(tiny_model, manifest(2), out, MONDAY), engine_factory=never)
    assert (tmp_path / "sweep/latest.json").stat().st_mtime_ns == before
    with pytest.raises(OutputConflictError):
        run(dated_spec(tiny_model, manifest(3, "edited.txt"), out, MONDAY), engine_factory=never)


def test_an_older_night_that_ends_late_leaves_the_pointer(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    out = f"{tmp_path}/sweep/{{date}}"
    run(dated_spec(tiny_model, manifest(1), out, TUESDAY))
    before = (tmp_path / "sweep/latest.json").stat().st_mtime_ns
    late = run(dated_spec(tiny_model, manifest(1), out, WEDNESDAY, date="2026-11-23"))
    assert late.exit_code == 0
    assert late.latest is not None
    assert (late.out, late.latest.date) == (f"{tmp_path}/sweep/2026-11-23", "2026-11-24")
    assert (tmp_path / "sweep/latest.json").stat().st_mtime_ns == before  # not even for a moment
    assert pointer(tmp_path / "sweep")["date"] == "2026-11-24"


def test_failed_samples_leave_the_pointer_alone(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    out = f"{tmp_path}/sweep/{{date}}"
    run(dated_spec(tiny_model, manifest(["one"]), out, MONDAY))
    failed = run(dated_spec(tiny_model, manifest(["two", "poison"]), out, TUESDAY))
    assert (failed.exit_code, failed.latest) == (1, None)
    assert pointer(tmp_path / "sweep")["date"] == "2026-11-23"
    (tmp_path / "sweep/latest.json").write_text("{")  # a later day must not point to the failed one either
    assert run(dated_spec(tiny_model, manifest(["one"]), out, MONDAY)).latest is not None
    assert pointer(tmp_path / "sweep")["date"] == "2026-11-23"


def test_two_drivers_of_one_night_write_one_pointer(tiny_model: Path, manifest: Manifest, tmp_path: Path) -> None:
    spec = dated_spec(tiny_model, manifest(8), f"{tmp_path}/sweep/nightly-{{date}}", MONDAY)
    gate, summaries = threading.Barrier(2), list[RunSummary]()

    def drive() -> None:
        gate.wait()
        summaries.append(run(spec, engine_factory=fake_engine))

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert [summary.exit_code for summary in summaries] == [0, 0]
    assert pointer(tmp_path / "sweep", "nightly-latest.json")["counts"]["ok"] == 8
    assert {summary.latest.date for summary in summaries if summary.latest} == {"2026-11-23"}


@pytest.mark.parametrize("at", range(4))
def test_a_newer_night_that_ends_while_an_older_one_writes_stays(
    at: int, tiny_model: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer day publishes and points before the older one's call number `at` on the store: at any, it stays."""
    template = f"{tmp_path}/sweep/{{date}}"
    spec = dated_spec(tiny_model, manifest(1), template, TUESDAY)
    older = dated_spec(tiny_model, manifest(1), template, MONDAY)
    run(older)
    (tmp_path / "sweep/latest.json").unlink()
    calls = itertools.count()
    busy = [False]

    def interleaved(verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Storage, path: str, *data: bytes) -> Any:
            if not busy[0] and next(calls) == at:
                busy[0] = True
                run(spec)
            return verb(self, path, *data)

        return call

    for name in ("read", "write"):
        monkeypatch.setattr(Storage, name, interleaved(getattr(Storage, name)))
    assert older.dated is not None
    found = point_to_latest(older.dated, WEDNESDAY)
    assert busy == [True]
    assert found is not None
    assert (found.date, pointer(tmp_path / "sweep")["date"]) == ("2026-11-24", "2026-11-24")


@pytest.mark.parametrize(
    ("out", "folder", "name"),
    [
        ("s3://bucket/sweep/{date}", "s3://bucket/sweep", "latest.json"),
        ("s3://bucket/{date}/", "s3://bucket", "latest.json"),
        ("nightly-{date}", ".", "nightly-latest.json"),
        ("/{date}.v2", "/", "latest.v2.json"),
    ],
)
def test_a_template_says_where_its_pointer_lies(out: str, folder: str, name: str) -> None:
    dated = dated_output(out, today=MONDAY)
    assert dated is not None
    assert (dated.folder, dated.pointer) == (folder, name)
    assert dated.out == out.rstrip("/").replace("{date}", "2026-11-23")
    assert dated.outputs_until(WEDNESDAY)[-1] == DatedOutput(template=dated.template, date="2026-11-25")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"out": "s3://bucket/{day}"}, "the only placeholder is {date}"),
        ({"out": "s3://bucket/{date"}, "the only placeholder is {date}"),
        ({"out": "s3://bucket/{date:%Y}"}, "the only placeholder is {date}"),
        ({"out": "s3://bucket/{date}/sweep"}, "belongs into the last part"),
        ({"out": "s3://{date}"}, "belongs into the last part"),
        ({"out": "out/{date}", "date": "yesterday"}, "date 'yesterday' is no day"),
        ({"out": "out/sweep", "date": "2026-11-23"}, "has no {date}"),
    ],
)
def test_any_other_template_is_refused_in_one_line(flags: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(None, {"prompts": ["a.txt"], **flags})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_placeholder_nothing_lies_beside_the_output(
    tiny_model: Path, manifest: Manifest, tmp_path: Path
) -> None:
    summary = run(dated_spec(tiny_model, manifest(1), f"{tmp_path}/sweep/out", MONDAY))
    assert summary.latest is None
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["out"]
    assert latest.point_to_latest(DatedOutput(template=f"{tmp_path}/sweep/{{date}}", date="2026-11-23"), MONDAY) is None


def test_a_job_file_may_have_the_template_and_the_date(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("prompts: a.txt\nout: out/sweep/{date}\ndate: 2026-11-22\n")
    assert resolve(str(job), {}).out == "out/sweep/2026-11-22"
    assert resolve(str(job), {"date": "2026-11-21"}).out == "out/sweep/2026-11-21"


def test_a_submitted_night_keeps_its_template_and_its_date(tmp_path: Path) -> None:
    flags = {"prompts": ["a.txt"], "out": "s3://bucket/sweep/{date}", "seed": 3}
    spec = resolve(None, flags, today=MONDAY)
    (tmp_path / "job.yaml").write_bytes(portable_job_file(spec, ["s3://bucket/a.txt"]))
    on_the_cluster = resolve(str(tmp_path / "job.yaml"), {}, today=WEDNESDAY)
    assert (on_the_cluster.dated, on_the_cluster.out, on_the_cluster.seed) == (spec.dated, spec.out, 3)


def test_the_summary_says_where_the_pointer_is_and_whose_bits_there_are(
    tiny_model: Path, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(dated_spec(tiny_model, manifest(1), f"{tmp_path}/{{date}}", MONDAY))
    show_run(summary)
    told = capsys.readouterr().out
    assert f"{tmp_path}/latest.json, at 2026-11-23" in told
    assert "execution class" not in told
    show_run(replace(summary, execution_classes=("cpu", "cuda")))
    assert "of 2 execution classes" in capsys.readouterr().out
