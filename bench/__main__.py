"""Run benchmarks, each in a process of its own, and write `bench/RESULTS.md`: `python -m bench --list` shows all."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.bars import BARS
from bench.figures import figure
from bench.machine import ROOT, commit, describe_gpu, describe_machine
from bench.report import write_report
from bench.results import RESULTS, Result, store, stored
from bench.table import BENCHMARKS, Benchmark

TINY_RESULTS = ROOT / "out" / "bench-tiny" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every benchmark that was asked for gave its figures; whether they meet the bars is in the report."""
    options = _parser().parse_args(arguments)
    if options.list:
        for each in BENCHMARKS.values():
            print(f"{each.name:18} {each.target:10} {each.minutes:4.1f} min  {each.what}")
        return 0
    options.results = options.results or (TINY_RESULTS if options.tiny else RESULTS)
    failed = []
    for name in [] if options.render else _chosen(options):
        if not options.again and _is_known(options.results, BENCHMARKS[name]) and options.target == "bench-gpu":
            print(f"{name}: its figures of this commit and device are there; --again measures them anew")
        elif not _run(BENCHMARKS[name], options):
            failed.append(name)
    print(f"see {write_report(options.results, BARS)}")
    if failed:
        print(f"no figures of {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these benchmarks, of whatever target")
    parser.add_argument("--target", default="bench", choices=("bench", "bench-gpu"), help="all benchmarks of a target")
    parser.add_argument("--rounds", type=int, default=0, help="interleaved runs, in place of each benchmark's own")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes, to see whether it works")
    parser.add_argument("--again", action="store_true", help="measure what is known of this commit and device too")
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"), help="in place of the target's own")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: bench/results, tiny ones elsewhere")
    parser.add_argument("--render", action="store_true", help="only write the report again")
    parser.add_argument("--list", action="store_true")
    return parser


def _chosen(options: argparse.Namespace) -> list[str]:
    names = [name for name in options.only.split(",") if name]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise SystemExit(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return names or [each.name for each in BENCHMARKS.values() if each.target == options.target]


def _is_known(results: Path, benchmark: Benchmark) -> bool:
    known = stored(results, benchmark.device, benchmark.name)
    return known is not None and known.commit == commit() and known.device == (describe_gpu() or "")


def _run(benchmark: Benchmark, options: argparse.Namespace) -> bool:
    """Measure in a process of its own and keep the result; what went wrong is shown, and the next one gets its turn."""
    device = options.device or benchmark.device
    machine, began = describe_machine(), time.monotonic()
    print(f"{benchmark.name}: {benchmark.what} (about {benchmark.minutes:g} min)", flush=True)
    asked = {"device": device, "rounds": options.rounds, "tiny": options.tiny}
    # A process with no thread or library of another measurement; its own children find `bench` by the path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's processes do not all compile the same modules again
    done = subprocess.run(
        [sys.executable, "-m", "bench.one", benchmark.name, json.dumps(asked)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"{benchmark.name} ended with {done.returncode}: {done.stdout[-2000:]}", file=sys.stderr, flush=True)
        return False
    measured = json.loads(done.stdout.splitlines()[-1])
    for name in [name for name in measured["details"] if name.endswith(".svg")]:
        place = options.results / device / f"{benchmark.name}-{name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(measured["details"].pop(name))
    result = Result(
        name=benchmark.name,
        device=(describe_gpu() if device == "cuda" else None) or machine["processor"],
        command=f"make {'bench-gpu' if benchmark.target == 'bench-gpu' else 'bench'} ONLY={benchmark.name}",
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 1),
        tiny=options.tiny,
        machine=machine,
        figures=tuple(figure(each["name"], each["unit"], each["values"]) for each in measured["figures"]),
        notes=tuple(measured["notes"]),
        details=measured["details"],
    )
    print(f"  {result.seconds:.0f} s, {store(options.results, device, result)}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
