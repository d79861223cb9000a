from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from latentmill.jobs.errors import JobError
from latentmill.jobs.outputs.verify import VerifyProgress
from latentmill.jobs.progress import Progress
from latentmill.jobs.show.display import (
    BarView,
    LineView,
    duration,
    print_facts,
    print_json,
    print_table,
    progress_detail,
    progress_view,
    safe,
    size,
    verify_detail,
)
from latentmill.jobs.speed import StageSpeed
from latentmill.jobs.terminal import held_back_stderr

HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\u200b\ud800\x00\r\n\t[link=http://x]y[/link]"


def progress(**changes) -> Progress:
    values = {
        "phase": "generating",
        "done": 8,
        "total": 24,
        "ok": 6,
        "flagged": 1,
        "failed": 1,
        "chunks_done": 2,
        "chunks_total": 6,
        "actors": 2,
        "images_per_second": 1.25,
        "eta_seconds": 12.8,
        "made_at": time.monotonic(),
    }
    return Progress(**{**values, **changes})


def test_hostile_text_is_spelled_out_on_one_line():
    shown = safe(HOSTILE)
    assert shown.isprintable()
    assert shown.startswith("\\x1b]52;c;ZXZpbA==\\x07\\x1b[2J\\x9b31m\\u202egnp.exe\\u2066\\u200b\\ud800\\x00\\r\\n\\t")
    assert safe("naïve 日本語 😀 [bold]") == "naïve 日本語 😀 [bold]"


def test_long_text_is_cut_and_says_so():
    assert safe("abcdef", 4) == "abc…"
    assert safe("abcd", 4) == "abcd"
    assert len(safe("\x1b" * 10, 8)) == 8


def test_tables_and_facts_show_untrusted_cells_literally(capsys):
    print_table("t", ["a"], [[HOSTILE]])
    print_facts("[red]title", {"value": HOSTILE})
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[link=http://x]y[/link]" in shown.replace("\n", "").replace(" ", "")
    assert "[red]title" in shown


def test_json_is_ascii_and_round_trips(capsys):
    print_json({"prompt": HOSTILE + "\x7f"})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"prompt": HOSTILE + "\x7f"}
    assert all(32 <= ord(character) < 127 or character == "\n" for character in shown)


def test_durations_and_sizes_read_well():
    assert [duration(value) for value in (None, 0, 65.4, 3723)] == ["-", "0:00", "1:05", "1:02:03"]
    assert [size(value) for value in (0, 999, 1500, 2_500_000, 3e12)] == ["0 B", "999 B", "1.5 kB", "2.5 MB", "3.0 TB"]


def test_detail_names_every_figure():
    assert progress_detail(progress()) == "1.25 img/s, ETA 0:13, 1 flagged, 1 failed, 2 actors"
    assert "ETA 0:03, " in progress_detail(progress(made_at=time.monotonic() - 10))
    assert "ETA -, " in progress_detail(progress(eta_seconds=None))


def test_stages_come_last_and_the_slowest_one_first():
    speeds = {"sample": 0.965, "reuse": 0.0001, "encode": 0.12, "write": 0.01, "check": 0.0049}
    stages = {name: StageSpeed(busy=share, images_per_second=1 / share) for name, share in speeds.items()}
    shown = progress_detail(progress(stages=stages))
    assert shown.endswith("2 actors; busy: sample 96%, encode 12%, write 1%")
    idle = {"sample": StageSpeed(busy=0.001, images_per_second=1000.0)}
    assert progress_detail(progress(stages=idle)).endswith("2 actors; busy: sample 0%")


def test_plain_lines_come_at_once_on_a_new_phase_and_every_so_often():
    stream = io.StringIO()
    with LineView(stream, every=0.05) as view:
        assert stream.getvalue() == "latentmill: planning [0:00]\n"
        view.update(progress(phase="planning", done=0))
        assert stream.getvalue().count("\n") == 1
        view.update(progress(phase="starting", done=0))
        view.update(progress())
        view.update(progress(done=9))
        head = stream.getvalue().splitlines()[1:3]
        time.sleep(0.3)
    lines = stream.getvalue().splitlines()
    assert head == [
        "latentmill: starting 0/24 [0:00] 1.25 img/s, ETA 0:13, 1 flagged, 1 failed, 2 actors",
        "latentmill: generating 8/24 [0:00] 1.25 img/s, ETA 0:13, 1 flagged, 1 failed, 2 actors",
    ]
    assert sum("generating 9/24" in line for line in lines) >= 2
    view.note("evil \x1b[2J")
    assert stream.getvalue().endswith("latentmill: evil \\x1b[2J\n")


def test_a_phase_that_waits_says_for_what_until_the_next_phase():
    stream = io.StringIO()
    with LineView(stream, every=0.05) as view:
        view.stage("hashing \x1b the model")
        time.sleep(0.2)
        view.update(progress(phase="starting", done=0))
        view.stage("starting Ray")
        view.update(progress(phase="starting", done=0))
        time.sleep(0.2)
        view.update(progress())
    shown = stream.getvalue()
    assert "planning (hashing \\x1b the model) [0:00]" in shown
    assert "starting (starting Ray) 0/24" in shown
    assert "starting 0/24" in shown
    assert "generating 8/24" in shown
    console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    with BarView(console) as bar:
        bar.stage("hashing the model")
        assert bar._bar.tasks[0].description == "planning: hashing the model"
        bar.update(progress(phase="starting"))
        assert bar._bar.tasks[0].description == "starting"


def test_bar_shows_every_figure_on_a_terminal_of_eighty_columns():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, legacy_windows=False)
    with BarView(console) as view:
        view.update(progress())
        view.note("stopping \x1b[2J")
    shown = stream.getvalue()
    assert "8/24" in shown
    assert "1.25 img/s, ETA 0:13, 1 flagged, 1 failed, 2 actors" in shown
    assert "stopping \\x1b[2J" in shown


def test_what_verify_reads_is_shown_as_it_goes(capfd):
    step = VerifyProgress(phase="checking", done=3, total=7, images=1200, bytes=2_500_000, defects=1)
    with progress_view("reading", verify_detail) as view:
        view.update(step)
        view.update(replace(step, phase="comparing", done=0, total=1))
    assert capfd.readouterr().err.splitlines() == [
        "latentmill: reading [0:00]",
        "latentmill: checking 3/7 [0:00] 1,200 images, 2.5 MB read, 1 defects",
        "latentmill: comparing 0/1 [0:00] 1,200 images, 2.5 MB read, 1 defects",
    ]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, legacy_windows=False)
    with BarView(console, "reading", verify_detail) as bar:
        bar.update(step)
    assert "3/7" in stream.getvalue()
    assert "1,200 images, 2.5 MB read, 1 defects" in stream.getvalue()


def fail_within(error: Exception) -> None:
    with held_back_stderr():
        os.write(2, b"the cause")
        raise error


def test_stderr_is_held_back_unless_something_unforeseen_happens(capfd):
    with held_back_stderr():
        os.write(2, b"chatter")
    with pytest.raises(JobError):
        fail_within(JobError("ours"))
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError):
        fail_within(KeyError())
    os.write(2, b" and afterwards")
    assert capfd.readouterr().err == "the cause and afterwards"


def test_the_view_goes_on_while_stderr_is_held_back():
    script = (
        "from latentmill.jobs.show.display import progress_view\n"
        "from latentmill.jobs.terminal import held_back_stderr\n"
        "import os\n"
        "with progress_view() as view, held_back_stderr():\n"
        "    os.write(2, b'chatter')\n"
        "    view.note('visible')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "latentmill: planning [0:00]\nlatentmill: visible\n"
