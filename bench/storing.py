"""Pictures a second to a disk and to an S3 server: a whole job with an engine of no cost, from its first picture on."""

from __future__ import annotations

from functools import partial

import numpy as np

from bench.figures import figure, interleaved, ratio
from bench.pictures import write_prompts
from bench.postprocessing import photo_like
from bench.processes import run_command
from bench.standin_jobs import KNOWN, SIDE, our_standin
from bench.store import s3_server
from bench.table import Context, Measured
from bench.tracing import read_trace
from bench.whole_jobs import Work


def throughput(context: Context, pictures: int = 128) -> Measured:
    """The mark, the PNG and all writes; no checker, and no time to generate."""
    pictures = 16 if context.tiny else pictures
    work = Work(manifest=write_prompts(context.folder / "prompts.parquet", pictures), steps=20, side=SIDE)
    known = context.folder / "pictures.npy"
    np.save(known, np.stack([photo_like(SIDE, seed) for seed in range(KNOWN)]))
    server = context.folder / "server"
    server.mkdir()
    runs = 0
    with s3_server(server) as address:

        def run(place: str) -> float:
            nonlocal runs
            runs += 1
            trace = context.folder / f"{runs}.trace"
            environment = {"BENCH_SECONDS": "0", "BENCH_PICTURES": str(known), "BENCH_TRACE": str(trace)}
            command = [*our_standin(work, f"{place}/{runs}"), "--safety", "none"]
            done = run_command(command, environment={**address, **environment})
            return pictures / (done.ended - min(span.began for span in read_trace(trace)))

        places = {"disk": str(context.folder), "S3 server": "s3://test"}
        found = interleaved({name: partial(run, at) for name, at in places.items()}, context.rounds)
    return Measured(
        figures=[
            *[figure(f"ours to {name}", "pictures/s", values) for name, values in found.items()],
            ratio("S3 server / disk, pictures a second", found["S3 server"], found["disk"]),
        ],
        notes=[f"{pictures} pictures of {SIDE} px, from the first one generated to the end, publishing included"],
    )
