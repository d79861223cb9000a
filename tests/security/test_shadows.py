"""The code that runs is the one that was installed, whatever files of a user's lie where the command is started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.jobs.errors import JobError
from latentmill.jobs.executors import ray_pool
from tests.jobs.driver import job_spec, read_dataset, run

COMMAND = Path(sys.executable).with_name("latentmill")
OURS = ["cli.py", "engine.py", "jobs/__init__.py", "configs/models.py"]
OTHERS = ["torch.py", "numpy.py", "yaml.py", "typer.py", "pyarrow/__init__.py", "ray.py", "einops.py"]
SMALL = ["--width", "64", "--height", "64", "--num-inference-steps", "2", "--chunk-size", "2", "--batch-size", "2"]
SMALL += ["--watermark", "none", "--safety", "none"]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray 2.60 uses its own old settings
]


@pytest.fixture
def decoys(tmp_path: Path) -> Callable[..., Path]:
    """A folder with modules that leave a trace and break whoever imports them."""

    def build(*names: str) -> Path:
        folder = tmp_path / "decoys"
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f"open({str(tmp_path / 'trace')!r}, 'a').write(__file__ + '\\n')\nraise RuntimeError(__name__)\n"
            )
        return folder

    return build


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def test_workers_import_nothing_from_where_the_command_is_started(decoys, tiny_model, manifest, tmp_path):
    folder = decoys(*OURS, *OTHERS, "latentmill/__init__.py", "latentmill/jobs/__init__.py", "latentmill.py")
    job = ["run", str(manifest(4)), "--out", str(tmp_path / "out"), "--model", str(tiny_model), *SMALL]
    done = start([str(COMMAND), *job, "--executor", "ray"], folder)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert not (tmp_path / "trace").exists(), (tmp_path / "trace").read_text()
    assert read_dataset(str(tmp_path / "out")).manifest["counts"]["ok"] == 4


def test_the_command_by_its_module_imports_nothing_from_where_it_is_started(decoys, tiny_model, manifest, tmp_path):
    """But for a `latentmill` there: Python looks that up before anything of ours is there to object."""
    job = ["run", str(manifest(2)), "--out", str(tmp_path / "out"), "--model", str(tiny_model), *SMALL]
    done = start([sys.executable, "-m", "latentmill", *job, "--executor", "inline"], decoys(*OURS, *OTHERS))
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert not (tmp_path / "trace").exists(), (tmp_path / "trace").read_text()


def test_a_module_that_is_missing_is_one_line(decoys, tmp_path: Path):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(decoys("typer.py"))}
    (tmp_path / "decoys/typer.py").write_text("import one_that_is_not_there")
    done = subprocess.run(
        [sys.executable, "-m", "latentmill", "--version"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {sys.executable} has no module one_that_is_not_there; install latentmill and its packages for it\n"
    )


def test_a_ray_that_cannot_start_any_process_is_one_line(decoys, tiny_model, manifest, monkeypatch, tmp_path):
    """A module that Ray itself needs in its processes: it would try for ever."""
    monkeypatch.setenv("PYTHONPATH", str(decoys("numpy.py")))
    with pytest.raises(
        JobError, match=r"^Ray could not start worker processes from \S+: .*; look .*PYTHONPATH"
    ) as told:
        run(job_spec(tiny_model, manifest(4), tmp_path / "out", executor="ray"))
    assert "\n" not in str(told.value)


def test_a_ray_whose_processes_never_answer_is_one_line(tiny_model, manifest, monkeypatch, tmp_path):
    """Those that hang before anything of ours runs in them."""
    monkeypatch.setattr(ray_pool, "START_SECONDS", 5.0)
    (tmp_path / "decoys").mkdir()
    (tmp_path / "decoys/numpy.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "decoys"))
    with pytest.raises(JobError, match=r"^Ray could not start worker processes .* none has answered within 5 s; look"):
        run(job_spec(tiny_model, manifest(4), tmp_path / "out", executor="ray"))


def test_workers_that_cannot_start_end_the_run_in_one_line(decoys, tiny_model, manifest, monkeypatch, tmp_path):
    """A package that no worker can import: Ray would start them again for ever."""
    monkeypatch.setenv("PYTHONPATH", str(decoys("PIL/__init__.py")), prepend=os.pathsep)
    with pytest.raises(
        JobError, match=r"^no node can work: on \S+ latentmill cannot start: RuntimeError: PIL; "
    ) as told:
        run(job_spec(tiny_model, manifest(4), tmp_path / "out", executor="ray"))
    assert "\n" not in str(told.value)
