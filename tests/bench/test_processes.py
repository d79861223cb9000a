"""Commands as the benchmarks run them: watched, killed on purpose, and never left behind."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.faults import Killer, Outcome, _account
from bench.processes import Process, read_process, run_command

pytestmark = pytest.mark.long


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_timed_with_the_processor_time_of_its_children():
    child = "sum(range(12_000_000))"
    run = run_command(
        python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}']); print('done')"), period=0.02
    )
    assert run.output == "done\n"
    assert len(run.processes) == 2
    assert 0.1 < run.cpu_seconds < 2 * run.seconds + 1


def test_what_a_command_leaves_behind_is_counted_and_ended():
    run = run_command(
        python(
            "import subprocess, sys, time\n"
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
            "time.sleep(0.5)"
        ),
        period=0.05,
    )
    assert run.outlived == 1
    deadline = time.monotonic() + 30  # a killed process is there until somebody has taken note of it
    while [each for each in run.processes.values() if _alive(each)]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started


def test_the_moment_at_which_a_file_is_there_is_noted(tmp_path):
    wanted = tmp_path / "file"
    run = run_command(
        python(f"import pathlib, time; time.sleep(0.3); pathlib.Path({str(wanted)!r}).touch(); time.sleep(0.6)"),
        awaited={"file": wanted.exists},
        period=0.02,
    )
    assert 0.3 < run.first["file"] < run.seconds - 0.3


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"ended with 3: .*no such model"):
        run_command(python("import sys; print('no such model'); sys.exit(3)"))


def test_a_driver_is_killed_once_its_share_is_done(tmp_path):
    killer = Killer(out=tmp_path, pictures=4, left=[(0.5, "driver")])
    code = (
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r}) / 'images'\n"
        "folder.mkdir()\n"
        "for number in range(4):\n"
        "    (folder / f'{number}.png').touch(); time.sleep(0.5)\n"
    )
    run = run_command(python(code), meanwhile=killer.look, period=0.02, check=False)
    assert run.exit_code == -signal.SIGKILL
    assert killer.kills == ["driver at 50%"]
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_rows_and_files_are_held_against_each_other(tmp_path: Path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "images").mkdir()
    rows = {"id": ["a", "b", "b"], "image": ["images/a.png", "images/b.png", "images/gone.png"]}
    pq.write_table(pa.table(rows), tmp_path / "dataset/part.parquet")
    for name in ("a", "b", "nobodys"):
        (tmp_path / f"images/{name}.png").touch()
    outcome = Outcome()
    _account(outcome, tmp_path, 5, "id")
    assert (outcome.lost, outcome.doubled, outcome.orphaned, outcome.missing_files) == (3, 1, 1, 1)
