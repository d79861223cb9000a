"""How figures are made of runs, and what the report makes of figures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from bench.bars import BARS, Bar
from bench.figures import figure, interleaved, ratio
from bench.report import write_report
from bench.results import Result, parse, store, stored
from bench.table import BENCHMARKS
from bench.timeline import Mark, Sample, draw
from bench.tracing import Span, idle_percent, read_trace, tail_seconds

BAR = Bar(name="a bar", benchmark="job-24", figure="ray-data / ours", limit=1.25, at_least=True)


def result(*values: float, load: float = 0.1, tiny: bool = False) -> Result:
    return Result(
        name="job-24",
        device="a processor",
        command="make bench ONLY=job-24",
        commit="0123456789ab",
        date="2026-01-01T00:00:00+00:00",
        seconds=60.0,
        tiny=tiny,
        machine={"load_1min": 9.0, "cores_busy": load, "cores": 2, "processor": "a processor"},
        figures=(figure("ray-data / ours", "x", values),),
        notes=("a note",),
        details={"seen": 1},
    )


def report(tmp_path: Path, *found: Result) -> str:
    for each in found:
        store(tmp_path / "results", "cpu", each)
    (tmp_path / "results").mkdir(exist_ok=True)
    return write_report(tmp_path / "results", [BAR]).read_text()


def test_contenders_take_turns_and_every_other_round_goes_backwards():
    order = []
    contenders = {name: (lambda name=name: order.append(name) or float(len(order))) for name in "abc"}
    values = interleaved(contenders, 3)
    assert "".join(order) == "abccbaabc"
    assert values == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_a_ratio_is_taken_run_by_run_before_the_median():
    found = ratio("peer / ours", [10, 20, 90], [10, 10, 30])
    assert found.values == (1.0, 2.0, 3.0)
    assert found.median == 2.0
    with pytest.raises(ValueError, match="zip"):
        ratio("peer / ours", [10, 20], [10])


def test_a_figure_without_a_value_is_refused():
    with pytest.raises(ValueError, match="'nothing' has no value"):
        figure("nothing", "s", [])


def test_a_result_is_read_as_it_was_written(tmp_path):
    store(tmp_path, "cpu", result(1.0, 2.0))
    assert stored(tmp_path, "cpu", "job-24") == result(1.0, 2.0)
    assert stored(tmp_path, "cuda", "job-24") is None
    assert parse(result(3.0).as_json()) == result(3.0)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (result(1.2, 1.3, 1.4), "| 1.3 (1.2 to 1.4) x | met |"),
        (result(1.25), "| 1.25 x | met |"),
        (result(1.2, 1.2, 9.0), "| 1.2 (1.2 to 9) x | **missed** |"),
        (result(1.3, load=2.5), "| 1.3 x | met, perhaps on a busy machine |"),
        (result(1.3, tiny=True), "| - | not measured (`job-24`) |"),
    ],
)
def test_whether_a_bar_is_met_follows_from_the_median(tmp_path, found, verdict):
    assert f"| a bar | >= 1.25{' x' if '- |' not in verdict else ''} {verdict}" in report(tmp_path, found)


def test_the_report_says_what_was_not_measured_and_what_means_nothing(tmp_path):
    assert "| job-24 | whole command, 24 pictures, otherwise as job-96 | | about 2.5 min | not measured |" in report(
        tmp_path
    )
    text = report(tmp_path, result(1.0, load=2.5, tiny=True))
    assert "Smallest shapes" in text
    assert "busy before it began: 2.5 cores busy" in text
    assert "- a note" in text


def test_a_later_result_takes_the_place_of_an_earlier_one(tmp_path):
    assert "| 1.5 x | met |" in report(tmp_path, result(0.5), result(1.5))
    assert len(list((tmp_path / "results").rglob("*"))) == 2  # the folder of the device, and one document


def test_an_upper_bar_is_met_by_less():
    bar = replace(BAR, at_least=False, limit=3.0)
    assert bar.met_by(figure("x", "ms", [3.0]))
    assert not bar.met_by(figure("x", "ms", [3.1]))


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_every_benchmark_of_the_table_can_be_called(benchmark):
    module, _, name = benchmark.call.partition(":")
    if module in {
        "storing",
        "standin_jobs",
        "starting",
        "whole_jobs",
        "faults",
        "overheads",
        "postprocessing",
        "scale",
    }:
        assert callable(getattr(import_module(f"bench.{module}"), name))
    else:  # imports diffusers when it runs, and torch at once
        assert f"def {name}(" in (Path(__file__).parents[2] / f"bench/{module}.py").read_text()


def test_every_bar_is_about_a_benchmark_of_the_table():
    assert {bar.benchmark for bar in BARS} <= set(BENCHMARKS)


def test_what_make_bench_runs_takes_about_a_quarter_of_an_hour():
    assert sum(each.minutes for each in BENCHMARKS.values() if each.target == "bench") <= 16


def test_idle_time_is_what_lies_between_the_batches_of_a_process():
    spans = [Span(1, 8, 0.0, 1.0), Span(1, 8, 3.0, 4.0), Span(2, 8, 10.0, 14.0)]
    assert idle_percent(spans) == pytest.approx(25.0)
    assert tail_seconds(spans, 15.0) == 1.0


def test_a_trace_is_read_line_by_line(tmp_path):
    (tmp_path / "trace").write_text("generated 7 8 1.5 2.25\ngenerated 9 4 2.0 3.0\n")
    assert read_trace(tmp_path / "trace") == [Span(7, 8, 1.5, 2.25), Span(9, 4, 2.0, 3.0)]
    assert read_trace(tmp_path / "none") == []


def test_a_timeline_shows_who_was_busy_and_names_workers_by_their_work():
    samples = [
        Sample(0.0, 5, "ray::Map<Generate>", 0.0),
        Sample(1.0, 5, "ray::Map<Generate>", 1.0),
        Sample(2.0, 5, "ray::IDLE", 1.0),
        Sample(2.0, 6, "/usr/bin/idle", 0.01),
    ]
    svg = draw("a run", samples, [Span(5, 8, 100.2, 100.9)], [Mark(101.0, "commit")], began=100.0)
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "ray::Map<Generate> 1.0 s" in texts
    assert "1 processes of less than 0.15 s are left out" in texts
    assert sum(element.get("fill") == "#36c" for element in root.iter()) == 1
    assert sum(element.get("fill") == "#444" for element in root.iter()) == 1
