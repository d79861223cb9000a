"""One command killed until it is done: `python -m tests.soak.killed --calm OUT --out OUT -- PROMPTS FLAGS...`.

What follows `--` are arguments of `latentmill run`. Its driver or one of its workers on Ray gets SIGKILL at moments
that a seed draws, and the same command is started again. Rows and files must then be those of the calm output, which
the same command made undisturbed. Exit code 1 if they are not, or if a process loaded a model twice.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentmill.jobs.ledger.ledger import chunk_of_path
from latentmill.jobs.outputs.verify import verify
from latentmill.jobs.store.storage import Storage
from tests.harness.cluster import ROOT
from tests.harness.processes import Family, below, send
from tests.jobs.driver import read_dataset
from tests.soak.noted_driver import LOADS

_WORKER = "ray::WorkerProcess"
_FAREWELL = 30.0
"""Seconds after a driver's death in which Ray's own processes end by themselves; then they are ended."""


@dataclass
class History:
    """How a command was killed and went on; `kills` are of whom, and how many chunks were committed then."""

    kills: list[tuple[str, int]] = field(default_factory=list)
    lives: int = 0
    exit_code: int = 0
    loads: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By process and model."""


def committed(out: str) -> int:
    """Chunks that stand in an output."""
    return sum(chunk_of_path(path) is not None for path, _ in Storage.open(out).list("ledger"))


def live_and_die(command: Sequence[str], out: str, folder: Path, *, seed: int, kills: int, span: float) -> History:
    """Run a command until it ends by itself; up to `kills` times somebody dies, each time within `span` seconds."""
    chooser, family, history = random.Random(seed), Family(), History()
    loads = folder / "loads.txt"
    environment = {LOADS: str(loads), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        while True:
            driver = family.start(command, environment, folder / "log", cwd=ROOT)
            history.lives += 1
            while len(history.kills) < kills and not _ends(driver, chooser.uniform(0.2, span)):
                history.kills.append((_kill(driver, chooser), committed(out)))
            code = driver.wait()
            if code != -signal.SIGKILL:
                break
            _wait_for_the_orphans(family)
    finally:
        family.end()
    history.exit_code = code
    if loads.exists():
        for line in loads.read_text().splitlines():
            pid, _, model = line.partition(" ")
            history.loads[pid, model] += 1
    return history


def _ends(driver: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        driver.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(driver: subprocess.Popen[bytes], chooser: random.Random) -> str:
    """SIGKILL to the driver or to one of its workers, if there is one; returns whom it met."""
    workers = [process for process in below(driver.pid) if process.title.startswith(_WORKER)]
    if workers and chooser.random() < 0.5:
        send(chooser.choice(workers).pid, signal.SIGKILL)
        return "worker"
    driver.kill()
    driver.wait()
    return "driver"


def _wait_for_the_orphans(family: Family) -> None:
    deadline = time.monotonic() + _FAREWELL
    while below() and time.monotonic() < deadline:
        family.reap()
        time.sleep(0.2)
    for process in below():
        send(process.pid, signal.SIGKILL)


def differences(calm: str, out: str) -> list[str]:
    """What of the rows (but for the attempt), of the files, and of their bytes is not as in the calm output."""
    expected, found = read_dataset(calm), read_dataset(out)
    told = []
    if found.manifest != expected.manifest:
        told.append("the manifests of the datasets differ")
    if not found.rows.equals(expected.rows):
        columns = [name for name in expected.rows.column_names if found.rows[name] != expected.rows[name]]
        told.append(f"rows differ in {', '.join(columns)}")
    samples = found.files.keys() | expected.files.keys()
    if other := [sample for sample in sorted(samples) if found.files.get(sample) != expected.files.get(sample)]:
        told.append(f"the files of {len(other)} samples differ, first {other[0]}")
    return told + [f"defect: {defect}" for defect in verify(out).defects]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.killed", description=__doc__)
    parser.add_argument("--calm", required=True, help="the output of the same command, undisturbed")
    parser.add_argument("--out", required=True, help="an output that is not there yet")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--span", type=float, default=30.0, help="most seconds from one kill to the next")
    parser.add_argument("arguments", nargs="+", help="of `latentmill run`, without --out; after `--`")
    told = parser.parse_args()
    command = [sys.executable, "-m", "tests.soak.noted_driver", "run", *told.arguments, "--out", told.out]
    with tempfile.TemporaryDirectory(prefix="lmk-") as folder:
        history = live_and_die(command, told.out, Path(folder), seed=told.seed, kills=told.kills, span=told.span)
        if history.exit_code:
            print((Path(folder) / "log").read_text()[-4000:], file=sys.stderr)
    found = [] if history.exit_code == 0 else [f"the last run ended with exit code {history.exit_code}"]
    found = found or differences(told.calm, told.out)
    found += [f"{pid} loaded {model} {times} times" for (pid, model), times in history.loads.items() if times > 1]
    print("killed, with so many chunks committed:", ", ".join(f"{who} at {count}" for who, count in history.kills))
    print(f"{len(history.kills)} kills, {history.lives} runs of the command, {committed(told.out)} chunks in the end")
    for model, processes in sorted(Counter(model for _, model in history.loads).items()):
        print(f"{model}: loaded by {processes} processes")
    files = len(read_dataset(told.out).files) if history.exit_code == 0 else 0
    print(*(found or [f"all rows and {files} files are those of the calm output, bit for bit"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
