"""What is done when a GPU is at hand, in order and in pieces of less than nine minutes: `python -m bench.gpu_day`.

The tests on the device, then each benchmark of `bench-gpu`, then training of the embedded model. What is done of this
commit on this device is not done again, so that a call that was cut off is simply made once more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import ROOT, commit, describe_gpu
from bench.table import BENCHMARKS

PIECE_SECONDS = 530.0
"""The most that one piece may take: it is ended then, and tried again by the next call."""

STATE = ROOT / "out" / "gpu-day" / "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One piece: a command and about how long it takes. `repeats`: it goes on where its last call stopped."""

    name: str
    command: tuple[str, ...]
    minutes: float
    repeats: int = 1


def pieces(training_minutes: float, *, tiny: bool, device: str = "cuda") -> list[Piece]:
    """All pieces, in their order."""
    python = sys.executable
    small = ("--tiny", "--rounds", "1", "--device", device) if tiny else ()
    tests = Piece(name="test-gpu", command=(python, "-m", "pytest", "-m", "gpu", "tests/gpu"), minutes=5)
    benchmarks = [
        Piece(name=each.name, command=(python, "-m", "bench", "--only", each.name, *small), minutes=each.minutes)
        for each in BENCHMARKS.values()
        if each.target == "bench-gpu"
    ]
    limit = 0.05 if tiny else 7.5
    training = Piece(
        name="train",
        command=(
            *(python, "-m", "bench.gpu_training", "--minutes", str(training_minutes)),
            *("--limit-minutes", str(limit)),
        ),
        minutes=limit + 0.5,
        repeats=max(1, round(training_minutes / limit)),
    )
    return [tests, *benchmarks, training]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing is left to do, 75 if the time was over before, 1 if a piece failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no piece that would end after that")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these pieces, done or not")
    parser.add_argument("--training-minutes", type=float, default=30.0)
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest shapes, on a CPU too, to see whether it works"
    )
    parser.add_argument("--list", action="store_true", help="show the pieces and what is done")
    parser.add_argument("--state", type=Path, default=STATE)
    options = parser.parse_args(arguments)
    device = describe_gpu()
    if device is None and not (options.tiny or options.list):
        raise SystemExit("torch sees no CUDA device here; --tiny shows on a CPU whether the pieces work")
    where = f"{commit()} on {device or 'a CPU'}"
    state = json.loads(options.state.read_text()) if options.state.is_file() else {}
    done: dict[str, int] = state.setdefault(where, {})
    began, failed = time.monotonic(), list[str]()
    chosen = [name for name in options.only.split(",") if name]
    for piece in pieces(options.training_minutes, tiny=options.tiny, device="cuda" if device else "cpu"):
        if options.list:
            print(f"{piece.name:18} {piece.minutes:4.1f} min, done {done.get(piece.name, 0)} of {piece.repeats}")
            continue
        if (piece.name not in chosen) if chosen else (done.get(piece.name, 0) >= piece.repeats):
            continue
        for _ in range(1 if chosen else piece.repeats - done.get(piece.name, 0)):
            left = options.seconds - (time.monotonic() - began)
            if left < 60 * piece.minutes:
                print(f"{left:.0f} s are left, {piece.name} takes {60 * piece.minutes:.0f}; call again for the rest")
                return 75
            if not _run(piece, min(left, PIECE_SECONDS)):
                failed.append(piece.name)
                break
            done[piece.name] = done.get(piece.name, 0) + 1
            options.state.parent.mkdir(parents=True, exist_ok=True)
            options.state.write_text(json.dumps(state, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(piece: Piece, seconds: float) -> bool:
    print(f"== {piece.name}: {' '.join(piece.command[1:])}", flush=True)
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(piece.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with everything that it started
        process.wait()
        print(f"== {piece.name}: ended after {seconds:.0f} s, which is all that a piece may take", flush=True)
        return False
    print(f"== {piece.name}: {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
