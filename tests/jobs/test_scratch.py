from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.plans.plan import draft_plan
from latentmill.jobs.scratch import CLUSTER_PREFIX, PLAN_PREFIX, scratch_folder, short_base
from tests.jobs.driver import job_spec


def age(folder: Path) -> None:
    os.utime(folder, (0, 0))


def test_the_folder_is_private_and_gone_afterwards(tmp_path: Path):
    with scratch_folder(tmp_path, CLUSTER_PREFIX) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "sub").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_only_the_folders_of_the_dead_are_removed(tmp_path: Path):
    script = (
        "import sys, time; from pathlib import Path; from latentmill.jobs.scratch import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1]), 'lm-') as folder: print(folder, flush=True); time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with owner:
        folder = Path(owner.stdout.readline().strip())
        strange, other = tmp_path / "lm-not-ours", tmp_path / "latentmill-other"
        strange.mkdir(), other.mkdir()
        age(folder), age(strange)
        with scratch_folder(tmp_path, CLUSTER_PREFIX):
            assert folder.is_dir()
        owner.send_signal(signal.SIGKILL)
    with scratch_folder(tmp_path, CLUSTER_PREFIX):
        assert not folder.exists()
    assert strange.is_dir()
    assert other.is_dir()


def test_a_folder_that_is_just_being_made_is_left_alone(tmp_path: Path):
    young = tmp_path / "lm-young"
    young.mkdir()
    (young / "owner.lock").touch()
    with scratch_folder(tmp_path, CLUSTER_PREFIX):
        assert young.is_dir()
    age(young)
    with scratch_folder(tmp_path, CLUSTER_PREFIX):
        assert not young.exists()


def test_the_base_leaves_room_for_socket_paths():
    assert len(str(short_base())) <= 12


def test_the_spool_of_a_killed_driver_is_removed_by_the_next(
    manifest: Callable[..., Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts, temporary = manifest(4), tmp_path / "tmp"
    temporary.mkdir()
    script = (
        "import sys, time; from latentmill.jobs.plans.plan import draft_plan; from tests.jobs.driver import job_spec\n"
        "with draft_plan(job_spec(*sys.argv[1:])): print('drafted', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_model), str(prompts), str(tmp_path / "out")]
    environment = os.environ | {"TMPDIR": str(temporary)}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with driver:
        assert driver.stdout.readline() == "drafted\n"
        driver.send_signal(signal.SIGKILL)
    (left,) = temporary.glob(f"{PLAN_PREFIX}*")
    assert list(left.glob("part-*.parquet"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    age(left)
    with draft_plan(job_spec(tiny_model, prompts, tmp_path / "out")):
        assert not left.exists()
    assert list(temporary.iterdir()) == []
