"""A sweep over models and scales of a LoRA, killed at random: the same rows and bytes, and no process loads twice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from latentmill.jobs.worker import load_engine
from tests.engine.loras import random_terms, write_kohya
from tests.harness.cluster import ROOT
from tests.harness.models import write_tiny_model
from tests.jobs.driver import job_spec, run
from tests.soak import killed


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_sweep_over_models_and_scales_killed_at_random_resumes_to_the_same_bytes(tiny_model: Path, tmp_path: Path):
    terms = random_terms(UNet2DConditionModel.from_pretrained(tiny_model / "unet"), 1)
    lora = write_kohya(tmp_path / "ink.safetensors", {"lora_unet": terms})
    models = [str(tiny_model), str(write_tiny_model(tmp_path / "other", seed=5))]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green star\n")
    calm, rough = str(tmp_path / "calm"), str(tmp_path / "rough")
    settings = {"width": 256, "height": 256, "num_inference_steps": 40, "threads_per_actor": 1, "safety": "none"}
    axes = {"model": models, "lora.ink": [0, 0.8], "seed": [0, 1]}
    spec = job_spec(models[0], prompts, calm, **settings, lora=[f"ink={lora}:0"], sweep=axes)
    assert run(spec, engine_factory=load_engine).exit_code == 0

    flags = [str(prompts), "--model", models[0], "--lora", f"ink={lora}:0", "--executor", "ray", "--num-actors", "2"]
    flags += ["--sweep", f"model={','.join(models)}", "--sweep", "lora.ink=0,0.8", "--sweep", "seed=0:2"]
    flags += ["--width", "256", "--height", "256", "--num-inference-steps", "40", "--safety", "none"]
    flags += ["--watermark", "none", "--chunk-size", "2", "--batch-size", "2", "--threads-per-actor", "1"]
    command = [sys.executable, "-m", "tests.soak.killed", "--calm", calm, "--out", rough]
    command += ["--kills", "3", "--span", "12", "--seed", "7", "--", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) kills", done.stdout)[1]) >= 2, done.stdout
    assert "all rows and 24 files are those of the calm output" in done.stdout

    picture = min(Path(calm).rglob("*.png"), key=lambda path: path.name)
    picture.write_bytes(picture.read_bytes() + b"x")
    assert killed.differences(calm, rough) == [f"the files of 1 samples differ, first {picture.stem}"]
