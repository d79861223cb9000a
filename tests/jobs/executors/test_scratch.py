from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.executors import scratch


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "_short_base", lambda: tmp_path)
    return tmp_path


def age(folder: Path) -> None:
    os.utime(folder, (0, 0))


def test_the_folder_is_private_and_gone_afterwards(base: Path):
    with scratch.scratch_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "sub").mkdir()
    assert list(base.iterdir()) == []


def test_only_the_folders_of_the_dead_are_swept(base: Path):
    script = (
        "import sys, time; from pathlib import Path; from jobs.executors import scratch\n"
        "scratch._short_base = lambda: Path(sys.argv[1])\n"
        "with scratch.scratch_folder() as folder: print(folder, flush=True); time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(base)], stdout=subprocess.PIPE, text=True)
    with owner:
        folder = Path(owner.stdout.readline().strip())
        strange = base / "lm-not-ours"
        strange.mkdir()
        age(folder), age(strange)
        with scratch.scratch_folder():
            assert folder.is_dir()
        owner.send_signal(signal.SIGKILL)
    with scratch.scratch_folder():
        assert not folder.exists()
    assert strange.is_dir()


def test_a_folder_that_is_just_being_made_is_left_alone(base: Path):
    young = base / "lm-young"
    young.mkdir()
    (young / "owner.lock").touch()
    with scratch.scratch_folder():
        assert young.is_dir()
    age(young)
    with scratch.scratch_folder():
        assert not young.exists()


def test_the_base_leaves_room_for_socket_paths():
    assert len(str(scratch._short_base())) <= 12
