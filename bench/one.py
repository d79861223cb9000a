"""One benchmark in this process: `python -m bench.one NAME JSON`. It prints its result as the last line."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.table import BENCHMARKS, Context


def main(name: str, options: str) -> None:
    """Measure in a folder that is gone afterwards."""
    asked: dict[str, Any] = json.loads(options)
    benchmark = BENCHMARKS[name]
    with tempfile.TemporaryDirectory(prefix="latentmill-bench-") as folder:
        context = Context(
            folder=Path(folder),
            device=asked["device"],
            rounds=asked["rounds"] or benchmark.rounds,
            tiny=asked["tiny"],
        )
        measured = benchmark.measure(context)
    figures = [each.as_json() for each in measured.figures]
    print(json.dumps({"figures": figures, "notes": measured.notes, "details": measured.details}))


if __name__ == "__main__":
    main(*sys.argv[1:])
