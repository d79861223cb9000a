"""From Enter to the first commit, and a picture of what every process does meanwhile."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from bench.figures import figure
from bench.pictures import write_prompts
from bench.processes import Process, run_command
from bench.table import Context, Measured
from bench.timeline import Mark, Sample, draw
from bench.tracing import read_trace
from bench.whole_jobs import Work, first_commit, our_command


def timeline(context: Context) -> Measured:
    """A job of three chunks on Ray and inline; the last run of each is drawn."""
    measured = Measured()
    pictures, steps = (8, 2) if context.tiny else (24, 20)
    work = Work(manifest=write_prompts(context.folder / "prompts.parquet", pictures), steps=steps, side=256)
    for executor in ("ray", "inline"):
        commits, wholes = [], []
        for number in range(context.rounds):
            out, trace = context.folder / f"{executor}-{number}", context.folder / f"{executor}-{number}.trace"
            command = our_command(work, str(out), executor=executor)
            traced = [sys.executable, "-m", "bench.own_engines", "traced_engine", *command[command.index("run") :]]
            samples: list[Sample] = []
            began = time.time()
            run = run_command(
                traced,
                environment={"BENCH_TRACE": str(trace)},
                awaited={"first commit": partial(first_commit, out)},
                meanwhile=partial(note, samples, began),
                period=0.1,
            )
            commits.append(run.first["first commit"])
            wholes.append(run.seconds)
        measured.figures.append(figure(f"{executor}: Enter to first commit", "s", commits))
        measured.figures.append(figure(f"{executor}: whole command", "s", wholes))
        title = f"latentmill run, {executor}: {pictures} pictures, {steps} steps, {wholes[-1]:.1f} s"
        measured.details[f"{executor}.svg"] = draw(title, samples, read_trace(trace), marks(out), began)
    return measured


def note(samples: list[Sample], began: float, _: int, seen: dict[tuple[int, int], Process]) -> None:
    """What the processes have used of the processor up to now."""
    now = time.time() - began
    samples += [Sample(now, each.pid, each.title, each.cpu_seconds) for each in seen.values()]


def marks(out: Path) -> list[Mark]:
    """When the output's files were there."""
    names = {"plan": "_job/plan.json", "commit": "ledger/*/*.parquet", "published": "_job/dataset.json"}
    return [Mark(path.stat().st_mtime, name) for name, pattern in names.items() for path in sorted(out.glob(pattern))]
