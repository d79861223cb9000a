"""A job as it is watched: lines, JSON and a screen, whose texts are harmless; and the summaries to paste."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from rich.live import Live

from latentmill.jobs.outputs.making import Making
from latentmill.jobs.outputs.pace import Pace
from latentmill.jobs.outputs.status import StatusReport
from latentmill.jobs.runner import RunSummary
from latentmill.jobs.show import watching
from latentmill.jobs.show.views import show_job_status, show_run
from latentmill.jobs.show.watching import LineLooks, ScreenLooks, watch
from latentmill.jobs.submission.api import JobInfo
from latentmill.jobs.submission.submission import JobStatus

BEGIN = 1_700_000_000.0
PACE = Pace(
    images_per_second=1.25,
    eta_seconds=3723.0,
    last_commit=BEGIN,
    silent_seconds=8.0,
    workers=4,
    stage_seconds={"sample": 1.2, "encode": 0.05, "write": 0.0123},
)
REPORT = StatusReport(
    out="s3://bucket/\x1b[2Jbirds",
    plan_hash="0" * 64,
    rows=100,
    rejected_rows=0,
    samples=4000,
    chunks=100,
    chunks_committed=25,
    repairs=0,
    published=False,
    counts=None,
    samples_committed=1000,
    pace=PACE,
)


def line(capsys, **changes) -> str:
    """What a look at such an output prints, without its time."""
    job = changes.pop("job", None)
    LineLooks().look(JobStatus(report=replace(REPORT, **changes) if changes != {"report": None} else None, job=job))
    shown = capsys.readouterr().out
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", shown)
    assert shown.count("\n") == 1
    return shown.partition(" ")[2].rstrip("\n")


def test_a_look_is_one_line(capsys):
    assert line(capsys) == (
        "started: 1,000 of 4,000 samples (25%), 1.25 img/s, ETA 1:02:03; last commit 0:08 ago, 4 workers in the last "
        "5 min; a picture takes sample 1.2 s (the slowest stage), encode 0.05 s, write 0.0123 s"
    )
    assert line(capsys, counts={"ok": 990, "flagged": 8, "failed": 2}).count("990 ok, 8 flagged, 2 failed") == 1


def test_a_look_says_that_nothing_comes_any_more(capsys):
    pace = replace(PACE, stalled=True, silent_seconds=723.0, images_per_second=0.0, eta_seconds=None)
    shown = line(capsys, pace=pace)
    assert "0.00 img/s, ETA -; no commit for 12:03; the last was at 2023-11-14T22:13:20Z" in shown


def test_a_look_at_what_has_not_begun_or_is_not_published(capsys):
    shown = line(capsys, pace=Pace(), chunks_committed=0, samples_committed=0)
    assert shown == "planned: 0 of 4,000 samples (0%); no commit yet"
    shown = line(capsys, chunks_committed=100, samples_committed=4000)
    assert shown.startswith(
        "complete: 4,000 of 4,000 samples (100%); every chunk is committed; the dataset is not published yet; "
    )
    job = JobInfo(job_id="latentmill-0123456789abcdef", address="http://head:8265", state="pending")
    shown = line(capsys, report=None, job=job)
    assert shown == "not planned yet, or not to be seen from here; job latentmill-0123456789abcdef is pending"


def test_a_screen_has_all_of_it_in_eighty_columns_and_nothing_that_steers_it():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, legacy_windows=False)
    with Live(console=console, auto_refresh=False) as live:
        view = ScreenLooks(live)
        view.look(JobStatus(report=REPORT, job=None))
        view.trouble("no answer \x1b[2J")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert "\\x1b[2Jbirds" in shown
    assert "started: 1,000 of 4,000 samples (25%), 1.25 img/s, ETA 1:02:03" in shown
    assert "last commit 0:08 ago, 4 workers in the last 5 min" in shown
    assert "a picture takes sample 1.2 s (the slowest stage), encode 0.05 s" in shown
    assert "no answer \\x1b[2J" in shown


@pytest.fixture
def looks(monkeypatch):
    """A job that is looked at twice, and then published; or, told so, interrupted."""
    ends: list[type[BaseException] | None] = [None]

    def watch_job(target, on_look, **options):
        on_look(JobStatus(report=REPORT, job=None))
        if ends[0] is not None:
            raise ends[0]
        counts = {"ok": 4000, "flagged": 0, "failed": 0}
        job = JobInfo(job_id="latentmill-0123456789abcdef", address="http://head:8265", state="failed")
        last = replace(REPORT, published=True, counts=counts, samples_committed=4000, pace=None)
        on_look(JobStatus(report=last, job=job))
        return JobStatus(report=last, job=job)

    monkeypatch.setattr(watching, "watch_job", watch_job)
    return ends


def test_watching_ends_as_status_does(looks, capsys):
    assert watch("out", every=10, deep=False, address=None, price=None, as_json=False) == 1
    shown = capsys.readouterr().out
    assert "published: 4,000 of 4,000 samples (100%)" in shown
    assert "4,000 ok, 0 flagged, 0 failed" in shown
    assert "state: failed" in shown


def test_watching_for_a_program_is_one_object_a_line(looks, capsys):
    assert watch("out", every=10, deep=False, address=None, price=None, as_json=True) == 1
    shown = capsys.readouterr().out
    assert shown.isascii()
    first, last = map(json.loads, shown.splitlines())
    assert first["state"] == "started"
    assert first["pace"]["eta_seconds"] == 3723.0
    assert first["pace"]["stage_seconds"] == {"sample": 1.2, "encode": 0.05, "write": 0.0123}
    assert (last["state"], last["counts"]["ok"], last["job"]["state"]) == ("published", 4000, "failed")
    assert first.keys() >= {"time", "out", "samples", "samples_committed", "chunks", "chunks_committed"}


def test_ctrl_c_ends_the_watching_only(looks, capsys):
    looks[0] = KeyboardInterrupt
    assert watch("out", every=10, deep=False, address=None, price=None, as_json=False) == 130
    assert capsys.readouterr().err == "latentmill: no longer watched; the job goes on as it did\n"


SUMMARY = RunSummary(
    exit_code=0,
    out="s3://bucket/birds",
    executor="inline (this process)",
    samples=24,
    rejected_rows=0,
    counts={"ok": 23, "flagged": 1, "failed": 0},
    generated=24,
    seconds=31.24,
    images_per_second=0.768,
    next_command="latentmill report s3://bucket/birds",
    failures=(),
    execution_classes=("cpu/fp32/" + "x" * 80,),
    stage_seconds={"sample": 19.6, "encode": 1.44, "load": 2.2},
    gpu_seconds=1800.0,
    cost=1.5,
)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_summary_of_a_run_is_plain_text_to_paste(capsys, monkeypatch, terminal):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    show_run(SUMMARY)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert shown.isascii()
    assert shown.splitlines() == [
        "finished",
        "  samples: 24",
        "  result: 23 ok, 1 flagged, 0 failed",
        "  this run: 24 images in 0:31 (31.2 s), 0.77 images/s",
        "  stages: sample 19.6 s, encode 1.4 s, load 2.2 s; slowest: sample",
        "  cost: about 1.50 for 30:00 of GPU time",
        "  executor: inline (this process)",
        "  classes: cpu/fp32/" + "x" * 80,
        "  images: s3://bucket/birds/images",
        "  dataset: s3://bucket/birds/dataset",
        "  next: latentmill verify s3://bucket/birds   or   latentmill report s3://bucket/birds",
    ]


def test_the_status_of_a_dataset_says_how_it_was_made(capsys):
    making = Making(
        execution_classes=("cpu",),
        seconds=280.0,
        pauses=1,
        images_per_second=4000 / 280,
        stage_seconds={"sample": 500.0, "write": 20.0},
        worker_seconds=7200.0,
        records_read=64,
        records=100,
    )
    counts = {"ok": 4000, "flagged": 0, "failed": 0}
    report = replace(REPORT, out="out/x y", published=True, counts=counts, pace=None, making=making)
    show_job_status(JobStatus(report=report, job=None), 3.0)
    shown = capsys.readouterr().out
    for words in (
        "made in: 4:40 (280.0 s), without 1 pause, 14.29 images/s",
        "stages: sample 500.0 s, write 20.0 s; slowest: sample (by 64 of 100 chunks)",
        "cost: about 6.00 for 2:00:00 of GPU time",
        "classes: cpu",
        "next: latentmill verify 'out/x y'   or   latentmill report 'out/x y'",
    ):
        assert words in shown
    show_job_status(JobStatus(report=report, job=None))
    assert "cost" not in capsys.readouterr().out
