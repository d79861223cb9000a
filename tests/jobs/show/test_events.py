"""`--log-json`: the events of a run, each with the keys that the table promises, and nothing that is not JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import pytest

from latentmill import cli
from latentmill.jobs.show import events, running
from latentmill.jobs.show.events import EVENTS, EventLog
from tests.jobs.driver import job_spec
from tests.jobs.fakes import fake_engine, slow_engine
from tests.jobs.show.test_display import HOSTILE, progress

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def parsed(text: str) -> list[dict]:
    """The events of these lines, each with exactly the keys that the table has."""
    told = [json.loads(line) for line in text.splitlines()]
    for event in told:
        assert list(event)[:2] == ["time", "event"]
        assert TIME.fullmatch(event["time"])
        assert event.keys() - {"time", "event"} == EVENTS[event["event"]].keys(), event["event"]
    assert [event["time"] for event in told] == sorted(event["time"] for event in told)
    return told


@pytest.fixture
def engine(monkeypatch):
    """Runs of the command are done by an engine without a model; a function changes which."""
    from latentmill.jobs import runner

    chosen = [fake_engine]
    original = runner.run_job
    monkeypatch.setattr(runner, "run_job", lambda spec, **options: original(spec, **options, engine_factory=chosen[0]))
    monkeypatch.setattr(events, "_begun", type(events._begun)())
    return lambda factory: chosen.__setitem__(0, factory)


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs the command here; exit code and both streams."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentmill", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run


@pytest.fixture
def job(tiny_model, manifest, tmp_path) -> list[object]:
    small = ["--width", 64, "--height", 64, "--num-inference-steps", 2, "--chunk-size", 2, "--batch-size", 2]
    rest = ["--watermark", "none", "--safety", "none", "--executor", "inline"]
    return [
        manifest(["a", "b", "c", "poison"]),
        "--out",
        tmp_path / "out",
        "--model",
        tiny_model,
        *small,
        *rest,
    ]


def test_a_run_is_told_from_its_start_to_its_summary(call, engine, job, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,sede\na,1\nb,2\npoison \u202e,3\n")
    code, out, err = call("run", tmp_path / "prompts.csv", *job[1:], "--log-json", "--json", "--gpu-hour-price", 2)
    assert code == 1
    assert err.isascii()
    told = parsed(err)
    names = [event["event"] for event in told]
    assert names[0] == "started"
    assert names[-2:] == ["progress", "finished"]
    assert set(names) == {"started", "plan", "phase", "stage", "note", "progress", "finished"}
    by_name = {event["event"]: event for event in told}
    assert by_name["started"]["arguments"][0] == "run"
    assert (by_name["plan"]["samples"], by_name["plan"]["chunks"], by_name["plan"]["chunks_committed"]) == (3, 2, 0)
    assert [event["phase"] for event in told if event["event"] == "phase"] == [
        "planning",
        "starting",
        "generating",
        "publishing",
        "done",
    ]
    assert "'sede'" in by_name["note"]["text"]
    last = by_name["progress"]
    assert (last["done"], last["total"], last["ok"], last["failed"]) == (3, 3, 2, 1)
    assert {"busy", "images_per_second"} == last["stages"]["sample"].keys()
    assert by_name["finished"]["exit_code"] == 1
    assert by_name["finished"]["summary"] == json.loads(out)
    assert by_name["finished"]["summary"]["failures"][0]["prompt"] == "poison \u202e"
    assert by_name["finished"]["summary"]["cost"] > 0


def test_a_job_file_can_ask_for_events_too(call, engine, job, tmp_path):
    (tmp_path / "job.yaml").write_text("log_json: true\n")
    code, out, err = call("run", *job, "--config", tmp_path / "job.yaml")
    assert code == 1
    assert parsed(err)[-1]["event"] == "finished"
    assert "failed samples (first 1 of 1)" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "missing\x1b.txt", "--log-json"], 2, "missing\x1b.txt does not exist"),
        (["run", "--log-json", "--steps", "3"], 2, "No such option: --steps"),
        (["run", "x.txt", "--log-json", "--config", "missing.yaml"], 2, "missing.yaml does not exist"),
    ],
)
def test_an_error_is_an_event(call, engine, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    got, out, err = call(*arguments)
    told = parsed(err)
    assert (got, out, told[-1]["event"], told[-1]["exit_code"]) == (code, "", "error", code)
    assert words in told[-1]["error"]
    assert "\x1b" not in err


def test_a_job_that_another_plan_has_is_an_event_with_its_code(call, engine, job):
    assert call("run", *job)[0] == 1
    code, _, err = call("run", *job, "--seed", 7, "--log-json")
    assert (code, parsed(err)[-1]["exit_code"]) == (3, 3)
    assert "seed: 42 -> 7" in parsed(err)[-1]["error"]


def test_the_first_signal_is_an_event_and_a_resumed_run_says_what_there_was(call, engine, job, monkeypatch):
    engine(slow_engine)
    original = EventLog.update

    def interrupting(self, state):
        original(self, state)
        if state.phase == "generating" and state.chunks_done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EventLog, "update", interrupting)
    code, _, err = call("run", *job, "--log-json")
    monkeypatch.setattr(EventLog, "update", original)
    told = parsed(err)
    if code == 130:  # else the last chunk was done by then
        assert "stopping" in [event["event"] for event in told]
        assert told[-1]["exit_code"] == 130
    resumed = [event for event in parsed(call("run", *job, "--log-json")[2]) if event["event"] == "plan"]
    assert resumed[0]["chunks_committed"] >= 1


def test_progress_is_told_every_so_often_and_the_time_left_runs_on():
    read, write = os.pipe()
    with EventLog(write, every=0.05) as log:
        log.update(progress(eta_seconds=100.0, made_at=time.monotonic()))
        time.sleep(0.3)
        log.note(HOSTILE)
    os.close(write)
    with os.fdopen(read) as stream:
        told = parsed(stream.read())
    states = [event for event in told if event["event"] == "progress"]
    assert len(states) >= 3
    assert states[0]["eta_seconds"] > states[-1]["eta_seconds"] > 99
    assert states[0]["elapsed_seconds"] < states[-1]["elapsed_seconds"]
    assert told[-1]["text"] == HOSTILE


def test_what_the_driver_of_a_submitted_job_reads_asks_for_events(tiny_model, manifest, tmp_path):
    from latentmill.jobs.submission.portable import portable_job_file

    spec = job_spec(tiny_model, manifest(2), tmp_path / "out", log_json=True, executor="ray")
    assert b"log_json: true" in portable_job_file(spec, list(spec.prompts))


def test_without_the_flag_there_is_the_usual_view(call, engine, job):
    _, _, err = call("run", *job)
    assert err.startswith("latentmill: planning [0:00]\n")
    assert running.STOPPING not in err
