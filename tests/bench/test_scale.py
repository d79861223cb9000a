"""A small scale benchmark as a guard: memory grows neither with the rows of a manifest nor with the chunks of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.synthetic import fill_ledger, write_manifest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
BYTES_PER_ROW = 40
BYTES_PER_CHUNK = 400
SLACK_MIB = 8  # an allocator's arenas and threads' stacks come and go

GROWTH = """
import json, sys
from bench.machine import peak_mib
from bench.measurements import MEASUREMENTS

name, *calls = json.loads(sys.argv[1])
facts = []
for call in calls:
    facts.append(MEASUREMENTS[name](**call) | {"peak_mib": peak_mib()})
print(json.dumps(facts))
"""


def measure(name: str, *calls: dict[str, object]) -> list[dict]:
    """The facts of calls one after another in one process, whose peak can only grow."""
    command = [sys.executable, "-c", GROWTH, json.dumps([name, *calls])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_planning_more_rows_takes_no_more_memory(tmp_path: Path) -> None:
    counts = (100_000, 400_000)
    calls = [
        {"manifest": str(write_manifest(tmp_path / f"{rows}.parquet", rows)), "out": str(tmp_path / "out")}
        for rows in counts
    ]
    few, many = measure("draft_only", *[call | {"settings": {}} for call in calls])
    assert (few["rows"], many["rows"]) == counts
    assert (many["peak_mib"] - few["peak_mib"] - SLACK_MIB) * 2**20 < BYTES_PER_ROW * (counts[1] - counts[0])


@pytest.mark.slow
def test_resuming_more_chunks_takes_no_more_memory(tmp_path: Path) -> None:
    counts = (2_000, 20_000)
    calls = []
    for chunks in counts:
        manifest = write_manifest(tmp_path / f"{chunks}.parquet", 100, num_images=chunks // 50)
        out = tmp_path / f"out{chunks}"
        calls.append({"manifest": str(manifest), "out": str(out), "settings": {"chunk_size": 2}})
    planned = measure("plan", *calls)
    assert [facts["chunks"] for facts in planned] == list(counts)
    for call, chunks in zip(calls, counts, strict=True):
        fill_ledger(Path(str(call["out"])), chunks, open_every=100)
    few, many = measure("resume", *calls)
    assert (many["committed"], many["pending"]) == (19_800, 200)
    assert (many["peak_mib"] - few["peak_mib"] - SLACK_MIB) * 2**20 < BYTES_PER_CHUNK * (counts[1] - counts[0])


@pytest.mark.parametrize(("limit", "met"), [(2.0, True), (1.0, False), (0.5, False)])
def test_a_bar_is_met_only_below_its_limit(limit: float, met: bool) -> None:
    from bench.scale import Bar

    assert Bar(name="a bar", limit=limit, value=1.0, unit="s").met is met
