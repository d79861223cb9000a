"""`bench/RESULTS.md`, made of the stored documents alone: no figure in it is written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.bars import Bar
from bench.figures import Figure
from bench.results import Result, all_stored
from bench.table import BENCHMARKS

_HEAD = """# Measured

Written by `make bench` from the documents in `results/`; change nothing here by hand. Each benchmark runs in a process
of its own; contenders take turns, and every other round goes backwards. Figures are medians, with the least and the
greatest in brackets. `a / b` is how many times as long `a` took as `b`, run by run: above 1, `b` is faster.
"""


def write_report(folder: Path, bars: Sequence[Bar]) -> Path:
    """Write the report beside the folder of results, and say where."""
    path = folder.parent / "RESULTS.md"
    path.write_text("\n".join(_lines(folder, bars)).rstrip() + "\n")
    return path


def _lines(folder: Path, bars: Sequence[Bar]) -> Iterator[str]:
    results = {result.name: result for _, result in all_stored(folder)}
    yield _HEAD
    yield from _bars(bars, results)
    yield from _overview(results)
    for name in BENCHMARKS:
        if name in results:
            yield from _section(results[name], folder)


def _bars(bars: Sequence[Bar], results: dict[str, Result]) -> Iterator[str]:
    yield "## Bars\n"
    yield "| bar | limit | measured | |"
    yield "|---|---|---|---|"
    for bar in bars:
        found = bar.find(results)
        limit = f"{'>=' if bar.at_least else '<='} {bar.limit:g}"
        if found is None:
            yield f"| {bar.name} | {limit} | - | not measured (`{bar.benchmark}`) |"
            continue
        verdict = "met" if bar.met_by(found) else "**missed**"
        busy = ", perhaps on a busy machine" if results[bar.benchmark].busy else ""
        yield f"| {bar.name} | {limit} {found.unit} | {_value(found)} {found.unit} | {verdict}{busy} |"
    yield ""


def _overview(results: dict[str, Result]) -> Iterator[str]:
    yield "## Benchmarks\n"
    yield "| name | what | command | took | commit | device | before |"
    yield "|---|---|---|---|---|---|---|"
    for name, benchmark in BENCHMARKS.items():
        if name not in results:
            yield f"| {name} | {benchmark.what} | | about {benchmark.minutes:g} min | not measured | | |"
            continue
        result = results[name]
        minutes = f"{result.seconds / 60:.1f} min"
        yield (
            f"| {name} | {benchmark.what} | `{result.command}` | {minutes} | {result.commit} "
            f"| {result.device} | {result.before} |"
        )
    yield ""


def _section(result: Result, folder: Path) -> Iterator[str]:
    yield f"## {result.name}\n"
    yield f"{BENCHMARKS[result.name].what}.\n"
    if result.tiny:
        yield "**Smallest shapes, to see whether it works: these figures mean nothing.**\n"
    if result.busy:
        yield f"**The machine may have been busy before it began: {result.before}.**\n"
    yield "| figure | median | runs | unit |"
    yield "|---|---|---|---|"
    for each in result.figures:
        yield f"| {each.name} | {_value(each)} | {len(each.values)} | {each.unit} |"
    yield ""
    for note in result.notes:
        yield f"- {note}"
    for picture in sorted(folder.glob(f"*/{result.name}*.svg")):
        yield f"\n![{result.name}](results/{picture.relative_to(folder).as_posix()})"
    versions = ", ".join(
        f"{name} {value}"
        for name, value in result.machine.items()
        if name not in {"load_1min", "cores_busy", "processor"}
    )
    yield f"\n{result.device}; {versions}; {result.date}.\n"


def _value(found: Figure) -> str:
    spread = f" ({_short(min(found.values))} to {_short(max(found.values))})" if len(found.values) > 1 else ""
    return f"{_short(found.median)}{spread}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
