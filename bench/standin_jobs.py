"""Whole jobs on an accelerator that is not there: it takes its time without CPU, so that all else can be seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.figures import figure, interleaved, ratio
from bench.pictures import write_prompts
from bench.postprocessing import photo_like
from bench.processes import CommandRun, run_command
from bench.table import Context, Measured
from bench.tracing import Span, idle_percent, pictures_made, read_trace, tail_seconds
from bench.whole_jobs import Work, our_command, peer_command

SIDE = 512
KNOWN = 32


def compare(context: Context, seconds: float, pictures: int, peers: Sequence[str]) -> Measured:
    """One accelerator, that many seconds a batch of 8: ours and the peers, with the same stand-in."""
    seconds, pictures = (0.05, 16) if context.tiny else (seconds, pictures)
    work = Work(manifest=write_prompts(context.folder / "prompts.parquet", pictures), steps=20, side=SIDE)
    known = context.folder / "pictures.npy"
    np.save(known, np.stack([photo_like(SIDE, seed) for seed in range(KNOWN)]))
    runs: dict[str, list[CommandRun]] = {name: [] for name in ("ours", *peers)}
    spans: dict[str, list[list[Span]]] = {name: [] for name in runs}
    tails: dict[str, list[float]] = {name: [] for name in runs}

    def run(name: str) -> float:
        number = len(runs[name])
        out, trace = context.folder / f"{name}-{number}", context.folder / f"{name}-{number}.trace"
        environment = {"BENCH_SECONDS": str(seconds), "BENCH_PICTURES": str(known), "BENCH_TRACE": str(trace)}
        runs[name].append(run_command(_command(name, work, out, f"{seconds}:{known}"), environment=environment))
        spans[name].append(read_trace(trace))
        if pictures_made(spans[name][-1]) < pictures:
            raise RuntimeError(f"{name} made {pictures_made(spans[name][-1])} pictures of {pictures}")
        tails[name].append(tail_seconds(spans[name][-1], runs[name][-1].ended))
        return runs[name][-1].seconds

    found = interleaved({name: partial(run, name) for name in runs}, context.rounds)
    measured = Measured(
        notes=[
            f"{pictures} pictures of {SIDE} px, {seconds} s a batch of 8, which alone is "
            f"{seconds * pictures / 8:.1f} s; one accelerator",
            "Idle is what lies between the first and the last batch. A peer that generates ahead of its second stage "
            "idles little and ends late: see the time from the last picture to the end.",
        ]
    )
    for name, of_name in runs.items():
        measured.figures += [
            figure(name, "s", found[name]),
            figure(f"{name}: generating stage idle", "%", [idle_percent(each) for each in spans[name]]),
            figure(f"{name}: from the last picture to the end", "s", tails[name]),
            figure(f"{name}: CPU time of all processes", "s", [each.cpu_seconds for each in of_name]),
            figure(f"{name}: processes started", "", [len(each.processes) for each in of_name]),
        ]
    measured.figures += [ratio(f"{name} / ours", found[name], found["ours"]) for name in peers]
    return measured


def our_standin(work: Work, out: str) -> list[str]:
    """Our command with the stand-in as its engine, of which there is one."""
    command = our_command(work, out)
    start = command.index("run")
    return [sys.executable, "-m", "bench.own_engines", "standin_engine", *command[start:], "--num-actors", "1"]


def _command(name: str, work: Work, out: Path, stand_in: str) -> list[str]:
    if name == "ours":
        return our_standin(work, str(out))
    command = peer_command(name, work, str(out))
    if "--actors" in command:
        command[command.index("--actors") + 1] = "1"
    return [*command, "--stand-in", stand_in]
