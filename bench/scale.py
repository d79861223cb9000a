"""How far it scales on this machine: a million chunks, ten million rows, and what the protocol costs a chunk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Figure, figure
from bench.machine import ROOT, keep_cores
from bench.measurements import Facts
from bench.store import s3_server
from bench.synthetic import fill_ledger, fill_output, job_spec, write_manifest
from bench.table import Context, Measured
from latentmill.jobs.job import open_job
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.store.storage import Storage

CORES = 2
CHUNK_SIZE = 32
SMALL_CHUNK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What was promised, held against the worst repetition."""

    name: str
    limit: float
    value: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value < self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything."""

    chunks: int
    rows: int
    records: int
    repeat: int


class Bench:
    """Runs measurements in processes of their own and keeps what they say."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.figures: list[Figure] = []
        self.bars: list[Bar] = []

    def measure(self, name: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> Facts:
        """The facts of one measurement."""
        command = [sys.executable, "-m", "bench.measurements", name, json.dumps(arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True, check=True
        )
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
        return facts

    def note(self, name: str, unit: str, values: Sequence[float]) -> None:
        """Keep one figure."""
        self.figures.append(figure(name, unit, values))


def measure_chunks(bench: Bench) -> None:
    """A job of so many chunks is planned; all but one in a thousand are committed; it is resumed."""
    chunks, repeat = bench.sizes.chunks, bench.sizes.repeat
    manifest = str(write_manifest(bench.folder / "chunks.parquet", chunks, num_images=CHUNK_SIZE))
    settings = {"chunk_size": CHUNK_SIZE}
    outs = [bench.folder / f"chunks{number}" for number in range(repeat)]
    plans = [bench.measure("plan", manifest=manifest, out=str(out), settings=settings) for out in outs]
    bench.note(f"plan {chunks:,} chunks, {plans[0]['samples']:,} samples", "s", list(map(total, plans)))
    committed = fill_ledger(outs[0], chunks, open_every=1000)
    arguments: dict[str, Any] = {"manifest": manifest, "out": str(outs[0]), "settings": settings}
    runs = [bench.measure("resume", **arguments) for _ in range(repeat)]
    bench.note(f"resume with {committed:,} of {chunks:,} chunks committed", "s", list(map(total, runs)))
    for step in ("draft", "ledger", "status"):
        bench.note(f"of that, {step}", "s", [facts["seconds"][step] for facts in runs])
    bench.note("run again, until its first new commit", "s", [total(bench.measure("first_commit", **arguments))])
    seconds = max(map(total, plans)) + max(map(total, runs))
    bench.bars.append(Bar(name=f"plan and resume {chunks:,} chunks", limit=60, value=seconds, unit="s"))
    bench.bars.append(Bar(name=f"memory for {chunks:,} chunks", limit=1000, value=peak(plans + runs), unit="MiB"))
    shutil.rmtree(outs[0])


def measure_rows(bench: Bench) -> None:
    """Parquet manifests of a tenth and of all the rows are planned: time grows with them, memory does not."""
    peaks = []
    for rows in (bench.sizes.rows // 10, bench.sizes.rows):
        manifest = str(write_manifest(bench.folder / f"rows{rows}.parquet", rows))
        runs = [
            bench.measure("draft_only", manifest=manifest, out=str(bench.folder / "none"), settings={})
            for _ in range(bench.sizes.repeat)
        ]
        bench.note(f"plan a manifest of {rows:,} rows", "s", list(map(total, runs)))
        peaks.append(peak(runs))
    growth = peaks[1] - peaks[0]
    bench.bars.append(
        Bar(name=f"memory that {bench.sizes.rows:,} rows add to a tenth", limit=64, value=growth, unit="MiB")
    )


def measure_dataset(bench: Bench) -> None:
    """A job of true commit records is published and verified."""
    out = bench.folder / "dataset"
    manifest = write_manifest(bench.folder / "dataset.parquet", bench.sizes.records, num_images=CHUNK_SIZE)
    with draft_plan(job_spec(manifest, out, chunk_size=CHUNK_SIZE)) as draft:
        adopt(draft, Storage.open(str(out)))
    fill_output(open_job(str(out)), out)
    publications, checks = [], []
    for _ in range(bench.sizes.repeat):
        shutil.rmtree(out / "dataset", ignore_errors=True)
        publications.append(bench.measure("publish_output", out=str(out)))
        checks.append(bench.measure("verify_output", out=str(out)))
    title = f"{bench.sizes.records:,} commit records"
    bench.note(f"publish {title}", "rows/s", [facts["rows"] / total(facts) for facts in publications])
    bench.note(f"verify {title} and pictures", "rows/s", [facts["rows"] / total(facts) for facts in checks])


def measure_overhead(bench: Bench) -> None:
    """What the protocol costs a chunk of four small pictures, beside its model: here, and on an S3 server."""
    manifest = str(write_manifest(bench.folder / "overhead.parquet", 200 * SMALL_CHUNK))
    settings = {"chunk_size": SMALL_CHUNK, "batch_size": SMALL_CHUNK}
    server = bench.folder / "seaweedfs"
    server.mkdir()
    with s3_server(server) as store:
        places = {"on a local disk": str(bench.folder / "overhead"), "on S3 (SeaweedFS)": "s3://test/overhead"}
        for where, out in places.items():
            runs = [
                bench.measure("overhead", store, manifest=manifest, out=f"{out}{number}", settings=settings)
                for number in range(bench.sizes.repeat)
            ]
            values = [facts["milliseconds_per_chunk"] for facts in runs]
            bench.note(f"protocol, a chunk of {SMALL_CHUNK} pictures {where}", "ms", values)


def total(facts: Facts) -> float:
    """All the seconds of a measurement."""
    return float(sum(facts["seconds"].values()))


def peak(runs: Sequence[Facts]) -> float:
    """The most memory that any of them took, in MiB."""
    return float(max(facts["peak_mib"] for facts in runs))


def as_benchmark(context: Context) -> Measured:
    """All of it, as one benchmark of the table."""
    sizes = Sizes(chunks=1_000_000, rows=10_000_000, records=2_000, repeat=context.rounds)
    if context.tiny:
        sizes = Sizes(chunks=2_000, rows=20_000, records=20, repeat=1)
    keep_cores(CORES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(context.folder, sizes)
    for measurement in (measure_overhead, measure_dataset, measure_rows, measure_chunks):
        measurement(bench)
    return Measured(
        figures=bench.figures,
        notes=[
            f"{bar.name}: {bar.value:,.1f} {bar.unit}, {'met' if bar.met else 'NOT MET'}: the limit is {bar.limit:,.0f}"
            for bar in bench.bars
        ],
    )
