"""What a job costs beside its model: many small pictures by an engine of no cost."""

from __future__ import annotations

import sys

from bench.figures import figure
from bench.processes import run_command
from bench.synthetic import SIDE, write_manifest
from bench.table import Context, Measured
from bench.tracing import idle_percent, read_trace, tail_seconds

CHUNK = 32


def whole_job(context: Context, samples: int) -> Measured:
    """Time per picture from the first chunk on, the driver's memory, and how busy the stages are."""
    samples = 128 if context.tiny else samples
    manifest = write_manifest(context.folder / "prompts.parquet", samples)
    seconds, memory, idle, tails, whole = [], [], [], [], []
    for number in range(context.rounds):
        trace = context.folder / f"{number}.trace"
        command = [
            *(sys.executable, "-m", "bench.own_engines", "quick_engine", "run", str(manifest)),
            *("--out", str(context.folder / f"out-{number}"), "--width", str(SIDE), "--height", str(SIDE)),
            *("--safety", "none", "--watermark", "none", "--num-inference-steps", "1", "--chunk-size", str(CHUNK)),
        ]
        run = run_command(command, environment={"BENCH_TRACE": str(trace)}, period=1.0, timeout=4 * 3600)
        ended, spans = run.ended, read_trace(trace)
        seconds.append(1000 * (ended - min(span.began for span in spans)) / samples)
        memory.append(run.driver_peak_mib)
        idle.append(idle_percent(spans))
        tails.append(tail_seconds(spans, ended))
        whole.append(run.seconds)
    return Measured(
        figures=[
            figure("time per picture", "ms", seconds),
            figure("driver's greatest memory", "MiB", memory),
            figure("whole command", "s", whole),
            figure("from the last picture to the end", "s", tails),
            figure("generating stage idle", "%", idle),
        ],
        notes=[f"{samples:,} pictures of {SIDE} px in chunks of {CHUNK}, on Ray; no mark, no checker, no model"],
    )
