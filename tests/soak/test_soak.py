"""The soak in small: one history under a dense storm, audited. `make soak` is the same for half an hour and more."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.cluster import ROOT


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_a_short_storm_breaks_no_invariant(tmp_path: Path):
    """A real cluster of three raylets, a real store behind the fault proxy, two drivers; a minute of storm."""
    report = tmp_path / "report.txt"
    command = [sys.executable, "-m", "tests.soak", "--minutes", "1", "--seed", "4", "--report", str(report)]
    with (tmp_path / "log").open("w") as log:
        soak = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            exit_code = soak.wait(380)
        finally:
            soak.send_signal(signal.SIGTERM)  # it ends all that it started
            soak.wait(60)
    text = (tmp_path / "log").read_text()
    assert exit_code == 0, text
    counted = {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)", report.read_text(), re.MULTILINE)}
    assert counted["kills"] >= 5, text
    assert counted["faults"] >= 100, text
    assert counted["audits"] >= 1, text
    assert counted["violations"] == 0, text
