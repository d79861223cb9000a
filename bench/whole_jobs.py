"""Whole commands, from Enter to the end: `latentmill run` and its peers, on the same manifest, to the same storage."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.figures import figure, interleaved, ratio
from bench.machine import ROOT
from bench.pictures import output_differences, say, write_prompts
from bench.processes import CommandRun, run_command
from bench.store import s3_server
from bench.table import Context, Measured

BATCH = 8
GUIDANCE = 3.0
MODEL = ROOT / "engine" / "embedded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What every contender is asked for."""

    manifest: Path
    steps: int
    side: int


def our_command(work: Work, out: str, *, executor: str = "ray") -> list[str]:
    """`latentmill run`, a chunk to a batch, so that the work spreads as evenly as the peer's."""
    return [
        *(sys.executable, "-m", "latentmill", "run", str(work.manifest), "--out", out, "--executor", executor),
        *("--num-inference-steps", str(work.steps), "--width", str(work.side), "--height", str(work.side)),
        *("--guidance-scale", str(GUIDANCE), "--chunk-size", str(BATCH), "--batch-size", str(BATCH)),
        *("--threads-per-actor", "1"),
    ]


def peer_command(name: str, work: Work, out: str) -> list[str]:
    """A peer of that name: two actors of one thread, or one process of all cores."""
    cores = len(os.sched_getaffinity(0))
    loop = name == "loop"
    command = [sys.executable, "-m", f"bench.peers.{'diffusers_loop' if loop else 'ray_data'}"]
    command += ["--manifest", str(work.manifest), "--out", out, "--model", str(MODEL), "--batch", str(BATCH)]
    command += ["--steps", str(work.steps), "--side", str(work.side), "--guidance", str(GUIDANCE)]
    command += ["--threads", str(cores)] if loop else ["--threads", "1", "--actors", str(cores)]
    if name == "ray-data-checkpoint":
        command += ["--checkpoint", f"{out}-checkpoint"]
    return command + (["--staged"] if name == "ray-data-staged" else [])


def first_commit(out: Path) -> bool:
    """Whether the output has a commit record."""
    return any(path.suffix == ".parquet" and path.name[0] != "." for path in (out / "ledger").glob("*/*"))


def compare(context: Context, pictures: int, peers: Sequence[str], *, s3: bool = False) -> Measured:
    """Seconds of whole commands in rounds, their ratios to ours, and whether the pictures are the same."""
    work = Work(
        manifest=write_prompts(context.folder / "prompts.parquet", 8 if context.tiny else pictures),
        steps=2 if context.tiny else 20,
        side=256,
    )
    runs: dict[str, list[CommandRun]] = {name: [] for name in ("ours", *peers)}
    environment: Mapping[str, str] = {}

    def run(name: str) -> float:
        out = place(name, len(runs[name]))
        command = our_command(work, out) if name == "ours" else peer_command(name, work, out)
        awaited = {"first commit": lambda: first_commit(Path(out))} if name == "ours" and not s3 else {}
        runs[name].append(run_command(command, environment=environment, awaited=awaited))
        return runs[name][-1].seconds

    def place(name: str, number: int) -> str:
        return f"{'s3://test/' if s3 else f'{context.folder}/'}{name}-{number}"

    with ExitStack() as stack:
        if s3:
            folder = context.folder / "server"
            folder.mkdir()
            environment = stack.enter_context(s3_server(folder))
        seconds = interleaved({name: partial(run, name) for name in runs}, context.rounds)
    measured = Measured()
    for name in runs:
        measured.figures.append(figure(name, "s", seconds[name]))
    for name in peers:
        measured.figures.append(ratio(f"{name} / ours", seconds[name], seconds["ours"]))
        if not s3:
            apart = output_differences(Path(place("ours", 0)), Path(place(name, 0)))
            measured.notes.append(say(f"pictures of ours and of {name}", apart))
    for name, of_name in runs.items():
        measured.figures.append(figure(f"{name}: CPU time of all processes", "s", [run.cpu_seconds for run in of_name]))
        measured.figures.append(figure(f"{name}: processes started", "", [len(run.processes) for run in of_name]))
    if not s3:
        first = [run.first["first commit"] for run in runs["ours"]]
        measured.figures.append(figure("ours: Enter to first commit", "s", first))
    measured.notes.append(f"{pictures if not context.tiny else 8} pictures, {work.steps} steps, batch {BATCH}")
    return measured
