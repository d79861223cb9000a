"""The GPU's day: pieces that fit a call, that are not done twice, and training that goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_day
from bench.gpu_day import Piece

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def note(folder: Path, name: str, *, code: int = 0, repeats: int = 1, minutes: float = 0.1) -> Piece:
    """A piece that notes that it ran."""
    line = f"open({str(folder / 'log')!r}, 'a').write({name + chr(10)!r}); raise SystemExit({code})"
    return Piece(name=name, command=(sys.executable, "-c", line), minutes=minutes, repeats=repeats)


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Run a day of these pieces; returns its exit code and what ran in all."""

    def run(pieces: list[Piece], *flags: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(gpu_day, "pieces", lambda *_, **__: pieces)
        code = gpu_day.main(["--tiny", "--state", str(tmp_path / "state.json"), *flags])
        log = tmp_path / "log"
        return code, log.read_text().split() if log.exists() else []

    return run


def test_no_piece_takes_nine_minutes_and_tests_come_first():
    pieces = gpu_day.pieces(30.0, tiny=False)
    assert pieces[0].name == "test-gpu"
    assert pieces[-1].name == "train"
    assert pieces[-1].repeats == 4
    assert max(piece.minutes for piece in pieces) < 9


def test_what_is_done_is_not_done_again(day, tmp_path):
    pieces = [note(tmp_path, "a"), note(tmp_path, "b", repeats=2)]
    assert day(pieces) == (0, ["a", "b", "b"])
    assert day(pieces) == (0, ["a", "b", "b"])
    assert day(pieces, "--only", "a") == (0, ["a", "b", "b", "a"])


def test_no_piece_is_begun_that_would_not_end_in_time(day, tmp_path):
    pieces = [note(tmp_path, "short", minutes=0.1), note(tmp_path, "long", minutes=5)]
    assert day(pieces, "--seconds", "60") == (75, ["short"])
    assert day(pieces) == (0, ["short", "long"])


def test_a_piece_that_fails_does_not_keep_the_others_from_their_turn_and_is_tried_again(day, tmp_path):
    assert day([note(tmp_path, "bad", code=1), note(tmp_path, "good")]) == (1, ["bad", "good"])
    assert day([note(tmp_path, "bad"), note(tmp_path, "good")]) == (0, ["bad", "good", "bad"])


def test_a_piece_that_hangs_is_ended_with_what_it_started(day, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "PIECE_SECONDS", 1.0)
    pid = tmp_path / "pid"
    line = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    code, _ = day([Piece(name="hangs", command=(sys.executable, "-c", line), minutes=0.1)])
    assert code == 1
    deadline = time.monotonic() + 10  # one that was killed may be there for a moment
    while _runs(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.long
def test_training_goes_on_from_the_shipped_weights_and_then_from_where_it_stopped(tmp_path):
    work, out = tmp_path / "work", tmp_path / "model"
    work.mkdir()
    latents = torch.randn(32, 8, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    tokens = torch.full((32, 2, 77), 841, dtype=torch.int16)
    counts = {"scenes": 16, "pairs": 8, "icons": 8}
    torch.save({"latents": latents, "tokens": tokens, "counts": counts}, work / "latents.pt")
    steps = []
    for _ in range(2):
        command = [sys.executable, "-m", "bench.gpu_training", "--work", str(work), "--out", str(out)]
        command += ["--minutes", "10", "--limit-minutes", "0.02"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=200)
        steps.append(torch.load(work / "diffusion.pt", weights_only=True)["step"])
    assert 0 < steps[0] < steps[1]
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.long
def test_training_without_icons_says_how_to_get_them(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_training", "--work", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "sprites.npz is not there; make it where there is a network: make gpu-prepare" in done.stderr
