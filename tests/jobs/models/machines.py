"""Processes that take a model as the actors of a node do, each with a cache of its node's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

_HOLD = """
import json, sys, time
from latentmill.jobs.models import cache, remote
from s3fs import S3FileSystem

reads, stop_after = [], int(sys.argv[3])
original = S3FileSystem.cat_file
def counted(self, path, *rest, **more):
    if len(reads) == stop_after:
        print("in the middle", flush=True)
        time.sleep(600)
    reads.append(path)
    return original(self, path, *rest, **more)
S3FileSystem.cat_file = counted
remote._THREADS = 1
print("ready", flush=True)
sys.stdin.readline()
path = cache.hold(sys.argv[1], json.loads(sys.argv[2]))
print(json.dumps({"path": str(path), "reads": len(reads)}), flush=True)
"""

_PLACE = """
import sys
from latentmill.jobs.job import open_job
from latentmill.jobs.models.place import place_model
print(place_model(open_job(sys.argv[1]).plan.model).model)
"""


def start_holder(url: str, files: dict[str, str], cache: Path, *, stop_after: int = -1) -> subprocess.Popen[str]:
    """A process that fetches the files once it reads a line, and then says where, and after how many reads."""
    command = [sys.executable, "-c", _HOLD, url, json.dumps(files), str(stop_after)]
    environment = {**os.environ, "LATENTMILL_CACHE": str(cache)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def place_on_node(out: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a node with this cache makes of the model of the job in `out`."""
    return subprocess.run(
        [sys.executable, "-c", _PLACE, out],
        check=False,
        cwd=ROOT,
        env={**os.environ, "LATENTMILL_CACHE": str(cache), **environment},
        text=True,
        capture_output=True,
        timeout=120,
    )
