"""The table of crash points: `python -m tests.crash_points`. Exit code 1 if any resume ended differently."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.harness.cluster import cluster
from tests.harness.models import write_tiny_model
from tests.harness.s3 import credentials, seaweedfs
from tests.jobs.crash_points import AT_ONCE, CLUSTER_CPUS, INLINE, RAY, S3, CrashPoint, Outcome, Stage, play


def main() -> int:
    """Play every crash point, print the table."""
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latentmill-crash-")))
        (folder / "s3").mkdir()
        s3 = credentials(stack.enter_context(seaweedfs(folder / "s3")))
        os.environ.update(s3)
        nodes = stack.enter_context(cluster(head_cpus=CLUSTER_CPUS))
        stage = Stage(folder=folder, model=write_tiny_model(folder / "model"), s3=s3, cluster=nodes)
        points = (*INLINE, *S3, *RAY)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = list(zip(points, pool.map(lambda point: play(point, stage), points), strict=True))
    sound = [outcome.sound for _, outcome in outcomes]
    console = Console(width=max(150, Console().width))
    console.print(_table(outcomes))
    console.print(
        f"{len(outcomes)} crash points, {sum(sound)} resumed to the undisturbed dataset, in "
        f"{time.monotonic() - started:.0f} s",
        highlight=False,
    )
    return 0 if all(sound) else 1


def _table(outcomes: list[tuple[CrashPoint, Outcome]]) -> Table:
    table = Table(title="SIGKILL at each phase, then the same command again on a new output each")
    for heading in ("phase", "moment", "killed", "executor", "store", "engine"):
        table.add_column(heading)
    for heading in ("chunks committed then", "images made again", "bit for bit equal"):
        table.add_column(heading, justify="right")
    for point, outcome in outcomes:
        table.add_row(
            *(point.phase, point.moment, point.victim, point.executor, point.store, "real" if point.real else "fake"),
            f"{outcome.committed} of {outcome.chunks}",
            f"{outcome.made_again} of {outcome.samples}",
            "yes" if outcome.sound else "NO",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
