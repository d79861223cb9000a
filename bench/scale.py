"""How far it scales on this machine: `python -m bench.scale --json FILE`. Exit code 1 if a bar is not met."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import figures
from bench.machine import describe_machine, keep_cores
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
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured quantity: all repetitions, and the most memory that any of them took."""

    name: str
    unit: str
    values: tuple[float, ...]
    peak_mib: float
    command: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)


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

    def measure(self, name: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> tuple[Facts, str]:
        """The facts of one measurement, and the command that gave them."""
        command = [sys.executable, "-m", "bench.measurements", name, json.dumps(arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True, check=True
        )
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
        return facts, shlex.join(["python", *command[1:]]).replace(str(self.folder), "DIR")

    def note(self, name: str, unit: str, values: Sequence[float], runs: Sequence[tuple[Facts, str]]) -> Figure:
        """Keep and return one figure."""
        peak = max(facts["peak_mib"] for facts, _ in runs)
        figure = Figure(name=name, unit=unit, values=tuple(values), peak_mib=peak, command=runs[0][1])
        self.figures.append(figure)
        return figure


def measure_chunks(bench: Bench) -> None:
    """A job of so many chunks is planned; all but one in a thousand are committed; it is resumed."""
    chunks, repeat = bench.sizes.chunks, bench.sizes.repeat
    manifest = str(write_manifest(bench.folder / "chunks.parquet", chunks, num_images=CHUNK_SIZE))
    settings = {"chunk_size": CHUNK_SIZE}
    outs = [bench.folder / f"chunks{number}" for number in range(repeat)]
    plans = [bench.measure("plan", manifest=manifest, out=str(out), settings=settings) for out in outs]
    title = f"{chunks:,} chunks, {plans[0][0]['samples']:,} samples"
    planning = bench.note(f"plan {title}", "s", [total(facts) for facts, _ in plans], plans)
    committed = fill_ledger(outs[0], chunks, open_every=1000)
    arguments: dict[str, Any] = {"manifest": manifest, "out": str(outs[0]), "settings": settings}
    runs = [bench.measure("resume", **arguments) for _ in range(repeat)]
    name = f"resume with {committed:,} of {chunks:,} chunks committed"
    resuming = bench.note(name, "s", [total(facts) for facts, _ in runs], runs)
    for step in ("draft", "ledger", "status"):
        bench.note(f"  of that, {step}", "s", [facts["seconds"][step] for facts, _ in runs], runs)
    first = [bench.measure("first_commit", **arguments)]
    bench.note("run again, until its first new commit", "s", [total(facts) for facts, _ in first], first)
    seconds = max(planning.values) + max(resuming.values)
    bench.bars.append(Bar(name=f"plan and resume {chunks:,} chunks", limit=60, value=seconds, unit="s"))
    peak = max(planning.peak_mib, resuming.peak_mib)
    bench.bars.append(Bar(name=f"memory for {chunks:,} chunks", limit=1000, value=peak, unit="MiB"))
    shutil.rmtree(outs[0])


def measure_rows(bench: Bench) -> None:
    """Parquet manifests of a tenth and of all the rows are planned: time grows with them, memory does not."""
    figures = []
    for rows in (bench.sizes.rows // 10, bench.sizes.rows):
        manifest = str(write_manifest(bench.folder / f"rows{rows}.parquet", rows))
        runs = [
            bench.measure("draft_only", manifest=manifest, out=str(bench.folder / "none"), settings={})
            for _ in range(bench.sizes.repeat)
        ]
        figures.append(bench.note(f"plan a manifest of {rows:,} rows", "s", [total(facts) for facts, _ in runs], runs))
    few, many = figures
    growth = many.peak_mib - few.peak_mib
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
    bench.note(f"publish {title}", "rows/s", [facts["rows"] / total(facts) for facts, _ in publications], publications)
    bench.note(f"verify {title} and pictures", "rows/s", [facts["rows"] / total(facts) for facts, _ in checks], checks)


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
            values = [facts["milliseconds_per_chunk"] for facts, _ in runs]
            bench.note(f"protocol, a chunk of {SMALL_CHUNK} pictures {where}", "ms", values, runs)


def total(facts: Facts) -> float:
    """All the seconds of a measurement."""
    return float(sum(facts["seconds"].values()))


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
        figures=[figures.figure(each.name.strip(), each.unit, each.values) for each in bench.figures],
        notes=[
            f"{bar.name}: {bar.value:,.1f} {bar.unit}, {'met' if bar.met else 'NOT MET'}: the limit is {bar.limit:,.0f}"
            for bar in bench.bars
        ],
    )


def show(bench: Bench, machine: Mapping[str, Any], seconds: float) -> None:
    """The table that `make bench` prints."""
    console = Console(width=max(120, Console().width))
    table = Table(title=f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB")
    table.add_column("what")
    for heading in ("median", "least", "most", "peak MiB"):
        table.add_column(heading, justify="right")
    for figure in bench.figures:
        numbers = [
            f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
            for value in (figure.median, min(figure.values), max(figure.values))
        ]
        table.add_row(figure.name, f"{numbers[0]} {figure.unit}", *numbers[1:], f"{figure.peak_mib:,.0f}")
    console.print(table)
    for bar in bench.bars:
        verdict = "met" if bar.met else "NOT MET"
        console.print(
            f"{verdict}: {bar.name}: {bar.value:,.1f} {bar.unit}, the limit is {bar.limit:,.0f} {bar.unit}",
            markup=False,
            highlight=False,
        )
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "pyarrow", "numpy", "fsspec", "s3fs"))
    console.print(
        f"{bench.sizes.repeat} repetitions in {seconds:.0f} s, load {machine['load_1min']} at the start; {versions}",
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything, print the table, write the JSON; 0 if every bar is met."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--records", type=int, default=2_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    keep_cores(CORES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    machine = describe_machine()
    started = time.monotonic()
    sizes = Sizes(chunks=options.chunks, rows=options.rows, records=options.records, repeat=options.repeat)
    with tempfile.TemporaryDirectory(prefix="latentmill-bench-") as folder:
        bench = Bench(Path(folder), sizes)
        for measurement in (measure_overhead, measure_dataset, measure_rows, measure_chunks):
            measurement(bench)
    show(bench, machine, time.monotonic() - started)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "command": shlex.join(["python", "-m", "bench.scale", *sys.argv[1:]]),
            "machine": machine,
            "figures": [asdict(figure) for figure in bench.figures],
            "bars": [asdict(bar) | {"met": bar.met} for bar in bench.bars],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(bar.met for bar in bench.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
