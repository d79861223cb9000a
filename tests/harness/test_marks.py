"""`make test-quick` cannot start a store or a cluster by mistake (tests/conftest.py)."""

from __future__ import annotations

import subprocess

import pytest

MARKS = {"weed": "s3", "ray": "cluster", "gcs_server": "cluster"}


@pytest.mark.parametrize("program", MARKS)
def test_a_test_that_starts_a_server_without_its_mark_fails(program: str):
    with pytest.raises(AssertionError, match=f"mark it with @pytest.mark.{MARKS[program]}"):
        subprocess.Popen([f"/nowhere/{program}"])


@pytest.mark.s3
def test_a_marked_one_may():
    with pytest.raises(FileNotFoundError):
        subprocess.Popen(["/nowhere/weed"])
