"""`status --watch`: where a job stands and how fast it goes, from its ledger alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from latentmill.jobs.errors import UsageError
from latentmill.jobs.job import open_job
from latentmill.jobs.ledger.commit_times import CommitTimes
from latentmill.jobs.ledger.ledger import PER_FOLDER, record_path
from latentmill.jobs.outputs import making
from latentmill.jobs.outputs.pace import PaceOfLedger, newest_chunks, since_pause
from latentmill.jobs.outputs.status import status
from latentmill.jobs.outputs.watch import RECORDS_READ, OutputWatch
from latentmill.jobs.plans.plan import adopt, draft_plan
from latentmill.jobs.stages import STAGES
from latentmill.jobs.store.errors import StorageError
from latentmill.jobs.store.storage import Storage
from latentmill.jobs.submission.api import JobInfo
from latentmill.jobs.submission.watch import watch_job
from tests.jobs.driver import job_spec, run

BEGIN = 1_700_000_000.0


@pytest.fixture
def planned(tiny_model, manifest, tmp_path):
    """A function from a number of chunks of two samples to an output that is planned and not begun."""

    def make(n_chunks: int = 4, **settings) -> str:
        spec = job_spec(tiny_model, manifest(2 * n_chunks), tmp_path / "out", **settings)
        with draft_plan(spec) as draft:
            adopt(draft, Storage.open(spec.out))
        return spec.out

    return make


@pytest.fixture
def finished(tiny_model, manifest, tmp_path):
    """A function from a number of chunks to a published output."""

    def make(n_chunks: int = 4, **settings) -> str:
        spec = job_spec(tiny_model, manifest(2 * n_chunks), tmp_path / "out", **settings)
        assert run(spec).exit_code == 0
        return spec.out

    return make


def unfinish(out: str, keep: int) -> None:
    """As if only the first chunks were committed, ten seconds apart, and nothing published."""
    storage = Storage.open(out)
    storage.delete("_job/dataset.json")
    for chunk in range(open_job(out).plan.n_chunks):
        path = Path(out) / record_path(chunk)
        if chunk < keep:
            os.utime(path, (BEGIN + 10 * chunk, BEGIN + 10 * chunk))
        else:
            path.unlink()


@pytest.fixture
def requests(monkeypatch) -> Counter[str]:
    """How often each verb of the storage is called."""
    counted: Counter[str] = Counter()

    def count(verb: str) -> None:
        original = getattr(Storage, verb)

        def counting(self, path, *rest):
            counted[verb] += 1
            return original(self, path, *rest)

        monkeypatch.setattr(Storage, verb, counting)

    for verb in ("read", "list", "list_modified", "folders"):
        count(verb)
    return counted


def pace_of(out: str, times: list[float], now: float):
    """The pace of a job whose chunks were committed at these times, seconds from the beginning; NaN is open."""
    return PaceOfLedger(open_job(out).plan).at(BEGIN + np.array(times), BEGIN + now)


def test_rate_and_time_left_come_from_the_times_of_commits(planned):
    out = planned(100)
    pace = pace_of(out, [*range(10, 410, 10), *[np.nan] * 60], now=405.0)
    assert pace.images_per_second == pytest.approx(0.2)
    assert pace.eta_seconds == pytest.approx(600 - 5)
    assert (pace.last_commit, pace.silent_seconds, pace.stalled) == (BEGIN + 400, 5.0, False)


def test_bursts_and_a_clock_of_whole_seconds_hardly_matter(planned):
    out = planned(100)
    draws = np.random.default_rng(7)
    bursts = [round(40 * (1 + number // 4) + draws.uniform(0, 2)) for number in range(60)]
    pace = pace_of(out, [*bursts, *[np.nan] * 40], now=bursts[-1])
    assert pace.images_per_second == pytest.approx(0.2, rel=0.1)
    assert pace.eta_seconds == pytest.approx(400, rel=0.1)


def test_steps_count_in_what_is_left(planned):
    """Half of the chunks have four times as many steps, and 2.5 runs of the denoiser go with each picture anyway."""
    out = planned(20, sweep={"num_inference_steps": [10, 40]})
    pace = pace_of(out, [*range(10, 210, 10), *[np.nan] * 20], now=200.0)
    assert pace.eta_seconds == pytest.approx(20 * 10 * (2 * 40 + 2.5) / (2 * 10 + 2.5), rel=0.01)


def test_a_pause_of_a_resumed_job_does_not_count(planned):
    out = planned(40)
    times = [*range(10, 160, 10), *range(50_000, 50_150, 10), *[np.nan] * 10]
    pace = pace_of(out, times, now=50_140.0)
    assert pace.images_per_second == pytest.approx(0.2)
    assert pace.eta_seconds == pytest.approx(100)


def test_chunks_that_take_minutes_and_come_in_bursts_are_no_pauses():
    times = np.array([300.0 * (1 + number // 4) for number in range(40)])
    assert len(since_pause(newest_chunks(times), times)) == 40


def test_only_the_newest_commits_make_the_rate(planned):
    times = np.arange(10_000.0)
    assert len(newest_chunks(times)) == 601
    assert len(newest_chunks(times * 100)) == 64
    assert len(newest_chunks(times / 100)) == 4096
    assert len(newest_chunks(np.full(3, np.nan))) == 0


def test_silence_is_told_once_it_is_longer_than_usual(planned):
    out = planned(100)
    times = [*range(60, 3060, 60), *[np.nan] * 50]
    assert not pace_of(out, times, now=3000.0 + 230).stalled
    pace = pace_of(out, times, now=3000.0 + 723)
    assert (pace.stalled, pace.silent_seconds, pace.eta_seconds, pace.images_per_second) == (True, 723.0, None, 0.0)
    assert pace_of(out, [np.nan] * 100, now=9e9).last_commit is None
    assert not pace_of(out, [float(number) for number in range(100)], now=9e9).stalled  # all is committed


def test_a_look_tells_what_records_say_and_reads_few_of_them(finished, requests):
    out = finished(40)
    unfinish(out, keep=30)
    watch = OutputWatch(out, deep=False, clock=lambda: BEGIN + 290)
    requests.clear()
    report = watch.look()
    assert requests["read"] == 1 + RECORDS_READ  # is it published? and the newest records
    assert (requests["folders"], requests["list_modified"], requests["list"]) == (1, 1, 0)
    assert (report.state, report.chunks_committed, report.samples_committed, report.counts) == ("started", 30, 60, None)
    assert report.pace is not None
    assert report.pace.images_per_second == pytest.approx(0.2)
    assert report.pace.workers == 1
    assert {"encode", "write"} <= report.pace.stage_seconds.keys() <= STAGES.keys() - {"load"}
    requests.clear()
    watch.look()
    assert requests == {"read": 1, "folders": 1, "list_modified": 1}


def test_deep_counts_each_record_once(finished, requests):
    out = finished(20)
    unfinish(out, keep=18)
    watch = OutputWatch(out, deep=True, clock=lambda: BEGIN + 180)
    assert watch.look().counts == {"ok": 36, "flagged": 0, "failed": 0}
    requests.clear()
    assert watch.look().counts == {"ok": 36, "flagged": 0, "failed": 0}
    assert requests["read"] == 1


def test_folders_that_are_full_or_not_there_are_not_listed_again(tmp_path, requests):
    storage, n_chunks = Storage.open(str(tmp_path)), 5 * PER_FOLDER
    for chunk in [*range(PER_FOLDER), 2 * PER_FOLDER, 2 * PER_FOLDER + 1]:
        path = tmp_path / record_path(chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "ledger" / "somebody's").mkdir()
    (tmp_path / "ledger" / "00099").mkdir()
    commits = CommitTimes(storage, n_chunks)
    assert len(commits.look()) == PER_FOLDER + 2
    assert requests == {"folders": 1, "list_modified": 2}
    requests.clear()
    (tmp_path / record_path(2 * PER_FOLDER + 2)).touch()
    assert commits.look() == [2 * PER_FOLDER + 2]
    assert requests == {"folders": 1, "list_modified": 1}
    assert int(commits.committed.sum()) == PER_FOLDER + 3


def test_a_job_is_watched_from_its_plan_to_its_end(planned, tiny_model, manifest, tmp_path):
    out = planned(4)
    seen = []

    def sleep(seconds: float) -> None:
        assert seconds == 7.0
        run(job_spec(tiny_model, manifest(8), out))

    last = watch_job(out, seen.append, every=7.0, sleep=sleep)
    assert [look.report.state for look in seen] == ["planned", "published"]
    assert (last.exit_code, last.report.counts) == (0, {"ok": 8, "flagged": 0, "failed": 0})
    assert last.report.making is not None


def test_a_store_that_is_gone_for_a_while_is_asked_again(finished, monkeypatch):
    out = finished(2)
    unfinish(out, keep=1)
    failures = [StorageError("no answer", transient=True)] * 2
    look = OutputWatch.look

    def sometimes(self):
        if failures:
            raise failures.pop()
        return look(self)

    told: list[str] = []
    monkeypatch.setattr(OutputWatch, "look", sometimes)
    looks = []

    def stop(_: float) -> None:
        if looks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_job(out, looks.append, every=1, on_trouble=told.append, sleep=stop)
    assert told == ["no answer", "no answer"]
    assert looks[0].report.state == "started"
    monkeypatch.setattr(OutputWatch, "look", lambda self: (_ for _ in ()).throw(StorageError("forbidden")))
    with pytest.raises(StorageError, match="forbidden"):
        watch_job(out, looks.append, every=1, sleep=stop)


def test_a_clock_that_differs_from_the_stores_is_noticed_when_a_commit_comes(finished):
    out = finished(20)
    unfinish(out, keep=10)
    records = [Path(out) / record_path(chunk) for chunk in range(20)]
    data = records[0].read_bytes()
    now = [BEGIN + 90 + 5000]
    watch = OutputWatch(out, deep=False, clock=lambda: now[0])
    first = watch.look()
    assert first.pace is not None
    assert first.pace.stalled  # it may be so: nothing tells a fast clock from a dead job
    records[10].write_bytes(data)
    os.utime(records[10], (BEGIN + 100, BEGIN + 100))
    now[0] = BEGIN + 103 + 5000
    second = watch.look()
    assert second.pace is not None
    assert (second.pace.stalled, second.pace.silent_seconds) == (False, 0.0)
    now[0] = BEGIN + 903 + 5000
    third = watch.look()
    assert third.pace is not None
    assert (third.pace.stalled, third.pace.silent_seconds) == (True, 800.0)


@pytest.mark.parametrize(("state", "exit_code"), [("failed", 1), ("stopped", 0), ("succeeded", 0)])
def test_a_submitted_job_is_watched_until_its_cluster_says_that_it_is_over(planned, state, exit_code):
    out, states = planned(4), ["pending", "running", state]

    class Cluster:
        def info(self, job_id: str) -> JobInfo:
            return JobInfo(job_id=job_id, address="http://head:8265", state=states.pop(0), out=out)

    looks = []
    last = watch_job(
        "latentmill-0123456789abcdef",
        looks.append,
        every=1,
        address="http://head:8265",
        api=lambda *_: Cluster(),
        sleep=lambda _: None,
    )
    assert [look.job.state for look in looks] == ["pending", "running", state]
    assert [look.report.state for look in looks] == ["planned"] * 3
    assert last.exit_code == exit_code


def test_an_output_without_a_plan_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no plan"):
        watch_job(str(tmp_path), lambda _: None, every=1)


def test_a_published_dataset_says_how_it_was_made(finished, tmp_path):
    out = finished(30)
    for chunk in range(30):
        moment = BEGIN + 10 * chunk + (50_000 if chunk >= 20 else 0)
        os.utime(Path(out) / record_path(chunk), (moment, moment))
    found = status(out).making
    assert found is not None
    assert (found.pauses, found.records_read, found.records) == (1, 30, 30)
    assert found.seconds == pytest.approx(280, abs=1)
    assert found.images_per_second == pytest.approx(60 / 280, rel=0.01)
    assert found.execution_classes == ("fake",)
    assert list(found.stage_seconds)[-1] == "load"
    assert found.worker_seconds is not None
    assert sum(found.stage_seconds.values()) >= found.worker_seconds > 0
    assert json.dumps(status(out).to_dict())


def test_of_a_large_dataset_some_records_are_read_and_the_loading_is_left_out(finished, monkeypatch):
    monkeypatch.setattr(making, "MAX_RECORDS_READ", 6)
    found = status(finished(20)).making
    assert found is not None
    assert 4 <= found.records_read <= 6 < found.records == 20
    assert "load" not in found.stage_seconds
